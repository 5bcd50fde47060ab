//! An ErrorResponse: any bytes are read without a panic, and the result can be encoded for a client and read back.
#![no_main]

use lakebase_proxy::{
    protocol::{
        error::{ErrorFields, Report},
        frame::take_message,
    },
    status::Label,
    upstream::Failure,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let fields = ErrorFields::parse(data);
    let mut report = Report::new(&fields.code, fields.message.clone());
    report.detail.clone_from(&fields.detail);
    report.hint.clone_from(&fields.hint);
    for mut bytes in [report.encode_fatal(), report.encode_notice()] {
        let message = take_message(&mut bytes, usize::MAX)
            .expect("a frame")
            .expect("a whole one");
        assert!(bytes.is_empty());
        let again = ErrorFields::parse(message.body());
        assert_eq!(
            (again.code, again.message, again.detail, again.hint),
            (
                fields.code.clone(),
                fields.message.clone(),
                fields.detail.clone(),
                fields.hint.clone()
            ),
        );
    }
    let failure = Failure::server(fields, []);
    let report = failure.report(&Label::new("e"));
    assert!(!report.sqlstate.is_empty());
    assert!(!report.encode_fatal().is_empty());
});
