//! Whatever a manifest holds: a clear error with its place, or a manifest that reads back as the same.

#![no_main]

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
                assert!(!resolved.role_module.starts_with('/') && !resolved.role_module.contains(".."));
            }
        }
        Err(error) => assert!(error.to_string().starts_with("mvm-profiles.toml:")),
    }
});
