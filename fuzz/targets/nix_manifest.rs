//! Whatever a manifest holds: a clear error with its place, or a manifest that reads back as the same.

#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use mvm::vm::pool::nix_manifest::NixManifest;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match NixManifest::parse(text) {
        Ok(manifest) => {
            let again = NixManifest::parse(&manifest.to_toml()).expect("what was written can be read");
            assert_eq!(again, manifest);
            for (role, profile) in manifest.roles.keys().flat_map(|role| manifest.profiles.keys().map(move |profile| (*role, profile))) {
                let resolved = manifest.resolve(role, profile).expect("what is there resolves");
                assert_eq!(resolved.attribute, format!("tenant-{role}-{profile}"));
                let mut components = Path::new(&resolved.role_module).components();
                assert!(components.all(|component| matches!(component, Component::Normal(_))), "a module outside of the flake");
            }
        }
        Err(error) => assert!(error.to_string().starts_with("mvm-profiles.toml:")),
    }
});
