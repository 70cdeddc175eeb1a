//! Whatever a document holds: a clear error or a state, and a state that is written down is read as the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mvm::agent::desired::{Format, parse};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for format in [Format::Json, Format::Toml] {
        match parse(text, format) {
            Ok(desired) => {
                let written = serde_json::to_string(&desired).expect("a state can be written");
                let again = parse(&written, Format::Json).expect("what was written can be read");
                assert_eq!(again, desired);
            }
            Err(error) => assert!(!error.problems.is_empty() && !error.to_string().is_empty()),
        }
    }
});
