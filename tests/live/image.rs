//! The built-in image from real packages.

use std::path::{Path, PathBuf};

use mvm::image::{self, Image};

/// The agent of this build: `cargo xtask guest-agent` makes it.
fn agent() -> PathBuf {
    let named = std::env::var_os(image::AGENT_VARIABLE);
    image::find_agent(named.as_deref()).expect("the guest agent is built before the live tests run")
}

#[test]
fn it_is_made_once_and_again_when_damaged() {
    let images = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images");
    let agent = agent();
    let made: Image = image::builtin::ensure(&images, &agent, &|what| eprintln!("{what}")).unwrap();
    made.verify().unwrap();
    let quiet = |what: &str| panic!("{what}: nothing is made the second time");
    assert_eq!(image::builtin::ensure(&images, &agent, &quiet).unwrap(), made);
    std::fs::write(made.initrd(), "torn").unwrap();
    let again = image::builtin::ensure(&images, &agent, &|_| {}).unwrap();
    again.verify().unwrap();
    assert_eq!(again.manifest.revision, made.manifest.revision);
    assert_eq!(again.manifest.initrd, made.manifest.initrd, "the same input makes the same initramfs");
}
