//! Each rule of the server by itself, then random traffic against a model of a server.

mod reference;

use proptest::prelude::*;

use super::*;
use crate::protocol::frame::Scanner;

fn client(requests: &mut Requests, tags: &[u8]) {
    for &tag in tags {
        requests.from_client(Seen::Message { tag });
    }
}

/// Messages of the server; every ReadyForQuery reports an idle session.
fn server(requests: &mut Requests, tags: &[u8]) {
    for &tag in tags {
        requests.from_server(Seen::Message { tag });
        if tag == tag::READY_FOR_QUERY {
            requests.from_server(Seen::Status(b'I'));
        }
    }
}

/// Lines of messages, each `>` of the client or `<` of the server, that must leave the session at rest; and not before.
fn dialogue(lines: &[&str]) -> Requests {
    let mut requests = Requests::new();
    for line in lines {
        assert!(*line == lines[0] || !requests.is_at_rest(), "before {line}");
        let (direction, tags) = line.split_at(1);
        match direction {
            ">" => client(&mut requests, tags.as_bytes()),
            _ => server(&mut requests, tags.as_bytes()),
        }
    }
    assert!(requests.is_at_rest(), "{lines:?}: {requests:?}");
    assert_eq!(requests.outstanding(), 0);
    requests
}

#[test]
fn a_query_has_one_ready_for_query() {
    dialogue(&[">Q", "<TDDC", "<Z"]);
    dialogue(&[">Q", "<I", "<Z"]);
    dialogue(&[">Q", "<TDCTDE", "<Z"]);
    dialogue(&[">F", "<V", "<Z"]);
    dialogue(&[">F", "<E", "<Z"]);
}

#[test]
fn completed_requests_are_counted_once() {
    let mut requests = Requests::new();
    client(&mut requests, b"QQQ");
    assert_eq!(requests.outstanding(), 3);
    for status in *b"TEI" {
        requests.from_server(Seen::Status(status));
    }
    let all = Answered {
        queries: 3,
        transactions: 1,
    };
    assert_eq!(requests.take_answered(), all);
    assert_eq!(requests.take_answered(), Answered::default());
}

#[test]
fn a_transaction_is_at_rest_but_not_idle() {
    let mut requests = Requests::new();
    for (byte, status) in [
        (b'T', TransactionStatus::InTransaction),
        (b'E', TransactionStatus::Failed),
    ] {
        client(&mut requests, b"Q");
        server(&mut requests, b"C");
        requests.from_server(Seen::Status(byte));
        assert_eq!(requests.status(), status);
        assert!(requests.is_at_rest() && !requests.is_idle());
    }
}

#[test]
fn an_extended_request_ends_with_its_sync() {
    dialogue(&[">P", "<1", ">BDE", "<2TDDC", ">S", "<Z"]);
    dialogue(&[">PBDESBES", "<12nC", "<Z", "<2C", "<Z"]);
    dialogue(&[">BEHEH", "<2Ds", "<DC", ">CS", "<3Z"]);
    // An error of the Sync itself is that of the commit.
    dialogue(&[">PBES", "<12C", "<E", "<Z"]);
    dialogue(&[">S", "<Z"]);
}

#[test]
fn several_syncs_have_several_answers() {
    dialogue(&[">PBSSS", "<12Z", "<Z", "<Z"]);
}

#[test]
fn a_query_ends_an_extended_request_without_sync() {
    dialogue(&[">PBEQ", "<12C", "<TDC", "<Z"]);
    dialogue(&[">PBF", "<12", "<V", "<Z"]);
    // The error is that of the query: nothing is skipped.
    dialogue(&[">PBEQ", "<12C", "<E", "<Z"]);
}

#[test]
fn a_flush_alone_opens_nothing() {
    let mut requests = Requests::new();
    client(&mut requests, b"H");
    assert!(requests.is_at_rest());
}

/// A drain once waited for its whole grace time: the query behind a failed Parse never gets a response.
#[test]
fn everything_up_to_the_next_sync_is_skipped_after_an_error() {
    for request in [&b"PBEQ"[..], b"PBEQQ", b"PBE"] {
        let mut requests = Requests::new();
        client(&mut requests, request);
        assert!(!requests.is_idle(), "not failed yet");
        server(&mut requests, b"E");
        assert!(requests.is_idle() && requests.is_owed() && !requests.is_at_rest());
        client(&mut requests, b"PQcFH");
        assert!(requests.is_idle(), "skipped as well");
        client(&mut requests, b"S");
        assert!(!requests.is_idle());
        server(&mut requests, b"Z");
        assert!(requests.is_at_rest());
    }
    dialogue(&[">PBEQS", "<E", "<Z"]);
    dialogue(&[">PBEQS", "<12E", "<Z"]);
    dialogue(&[">PBESPBES", "<1E", "<Z", "<12C", "<Z"]);
    dialogue(&[">QPBEQPSQ", "<CZ", "<E", "<Z", "<C", "<Z"]);
}

#[test]
fn an_error_of_an_earlier_request_skips_nothing() {
    for request in [&b"PBESPBE"[..], b"QPBE", b"Q"] {
        let mut requests = Requests::new();
        client(&mut requests, request);
        server(&mut requests, b"E");
        assert!(!requests.is_idle());
    }
}

#[test]
fn an_error_is_the_reason_for_an_end_only_while_nothing_follows_it() {
    let mut requests = Requests::new();
    server(&mut requests, b"E");
    assert!(requests.is_explained());
    server(&mut requests, b"Z");
    assert!(!requests.is_explained());
    client(&mut requests, b"E");
    assert!(!requests.is_explained(), "an Execute is no error");
}

#[test]
fn a_copy_consumes_the_syncs_before_its_end() {
    dialogue(&[">PBDES", "<12nG", ">ddcS", "<C", "<Z"]);
    dialogue(&[">PBESddcS", "<12G", "<C", "<Z"]);
    dialogue(&[">PBESSddcSQ", "<12G", "<CZ", "<C", "<Z"]);
    dialogue(&[">PBESdc", "<12G", "<C", ">S", "<Z"]);
    dialogue(&[">PBEHdc", "<12G", "<C", ">PBES", "<12C", "<Z"]);
    dialogue(&[">QSdc", "<G", "<C", "<Z"]);
}

#[test]
fn one_query_may_copy_twice() {
    dialogue(&[">Qdc", "<G", "<CG", ">Sdc", "<C", "<Z"]);
    dialogue(&[">QdcdcQ", "<G", "<CG", "<CZ", "<C", "<Z"]);
}

#[test]
fn copy_messages_without_a_copy_are_ignored() {
    dialogue(&[">Qdcf", "<C", "<Z"]);
    dialogue(&[">PBcES", "<12", "<C", "<Z"]);
    let mut requests = Requests::new();
    client(&mut requests, b"dcf");
    assert!(requests.is_at_rest());
}

#[test]
fn a_failed_copy_of_a_query_is_over_at_once() {
    dialogue(&[">Q", "<G", ">d", "<E", "<Z"]);
    let requests = dialogue(&[">Qddc", "<G", "<E", "<Z"]);
    assert_eq!(requests.copy(), None);
}

#[test]
fn a_failed_copy_of_an_execute_needs_a_sync() {
    dialogue(&[">PBE", "<12G", ">df", "<E", ">S", "<Z"]);
    dialogue(&[">PBEHdcS", "<12G", "<E", "<Z"]);
}

/// The Sync ahead of the data is consumed by the COPY, or by the recovery from its failure.
#[test]
fn what_a_failed_copy_consumed_shows_with_later_answers() {
    let consumed = [">PBES", "<12G", ">dcS", "<E", "<Z", ">Q", "<TDC", "<Z"];
    dialogue(&consumed);
    let not_consumed = [">PBES", "<12G", ">dcS", "<E", "<Z", "<Z"];
    dialogue(&not_consumed);
    dialogue(&[">PBES", "<12G", "<E", "<Z"]);
    let with_a_query = [">PBESdcSQ", "<12G", "<E", "<Z", "<Z", "<C", "<Z"];
    dialogue(&with_a_query);
}

#[test]
fn requests_that_a_failed_copy_may_have_discarded_leave_it_uncertain() {
    let mut requests = Requests::new();
    client(&mut requests, b"PBES");
    server(&mut requests, b"12GE");
    client(&mut requests, b"dcQSQ");
    server(&mut requests, b"ZTCZ");
    assert!(!requests.is_at_rest());

    let mut requests = Requests::new();
    client(&mut requests, b"PBESPBES");
    server(&mut requests, b"12GEZ");
    assert!(!requests.is_at_rest() && !requests.is_owed());
}

#[test]
fn the_direction_of_a_copy_is_known() {
    let mut requests = Requests::new();
    for (response, copy) in [
        (b'G', CopyDirection::In),
        (b'H', CopyDirection::Out),
        (b'W', CopyDirection::Both),
    ] {
        client(&mut requests, b"Q");
        server(&mut requests, &[response, b'd']);
        assert_eq!(requests.copy(), Some(copy));
        client(&mut requests, b"dc");
        server(&mut requests, b"cCZ");
        assert!(
            requests.is_at_rest() && requests.copy().is_none(),
            "{requests:?}"
        );
    }
}

#[test]
fn a_server_that_breaks_the_rules_is_never_certain_to_be_at_rest() {
    for (request, answer) in [
        (&b""[..], &b"Z"[..]),
        (b"", b"C"),
        (b"Q", b"Z"),
        (b"Q", b"1CZ"),
        (b"S", b"CZ"),
        (b"PBES", b"1Z"),
        (b"S", b"GZ"),
        (b"Q", b"GCZ"),
        (b"Q", b"?CZ"),
    ] {
        let mut requests = Requests::new();
        client(&mut requests, request);
        server(&mut requests, answer);
        assert!(!requests.is_at_rest(), "{request:?} {answer:?}");
        assert!(!requests.is_owed(), "{request:?} {answer:?}");
    }
}

#[test]
fn a_terminate_is_no_request() {
    let mut requests = Requests::new();
    client(&mut requests, b"X");
    assert!(requests.is_terminated() && requests.is_at_rest());
}

#[test]
fn an_idle_session_takes_little_memory() {
    assert!(size_of::<Requests>() <= 80);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn random_traffic_leaves_the_model_and_the_server_agreed(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        is_tame: bool,
    ) {
        reference::run(&bytes, is_tame);
    }
}
