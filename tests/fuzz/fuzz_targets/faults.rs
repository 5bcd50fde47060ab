//! The emulator's faults: what is read is written again the same, and what is checked can be set.
#![no_main]

use lakebase_proxy::emulator::{Action, Fault, Faults};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(fault) = serde_json::from_slice::<Fault>(data) else {
        return;
    };
    let text = serde_json::to_string(&fault).expect("JSON");
    let again: Fault = serde_json::from_str(&text).expect("what was written is read");
    // serde_json reads a number of many digits only nearly.
    if !matches!(fault.action, Action::Merge(_)) {
        assert_eq!(again, fault);
    }
    assert_eq!(fault.check().is_ok(), Faults::default().add(fault).is_ok());
});
