//! Whatever is on a config drive: a clear error or a configuration, and one that is written down is read as the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mvm_guest_api::config::GuestConfig;

fuzz_target!(|data: &[u8]| {
    match GuestConfig::parse(data) {
        Ok(config) => assert_eq!(GuestConfig::parse(&config.to_json()).expect("what was written can be read"), config),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
