//! A stream of messages: the scanner, which holds nothing, and the reader of whole messages see the same, and the scanner
//! sees it however the stream is split. The first byte selects how.
#![no_main]

use bytes::BytesMut;
use lakebase_proxy::protocol::{
    frame::{Scanner, Seen, take_message},
    requests::Requests,
};
use libfuzzer_sys::fuzz_target;

fn scan(data: &[u8], piece: usize) -> (Vec<Seen>, bool, bool) {
    let mut scanner = Scanner::new();
    let mut seen = Vec::new();
    for chunk in data.chunks(piece) {
        scanner.scan(chunk, |event| seen.push(event));
    }
    (seen, scanner.is_at_boundary(), scanner.is_lost())
}

fuzz_target!(|data: &[u8]| {
    let Some((&piece, data)) = data.split_first() else {
        return;
    };
    let whole = scan(data, data.len().max(1));
    assert_eq!(whole, scan(data, usize::from(piece).max(1)));

    let mut buffer = BytesMut::from(data);
    let mut taken = Vec::new();
    let end = loop {
        match take_message(&mut buffer, usize::MAX) {
            Ok(Some(message)) => {
                taken.push(Seen::Message { tag: message.tag });
                if let (b'Z', Some(&status)) = (message.tag, message.body().first()) {
                    taken.push(Seen::Status(status));
                }
            }
            end => break end,
        }
    };
    let (seen, at_boundary, lost) = whole;
    assert!(seen.starts_with(&taken));
    assert_eq!(lost, end.is_err());
    assert_eq!(at_boundary, end.is_ok() && buffer.is_empty());

    let mut requests = Requests::new();
    for event in seen {
        requests.from_client(event);
        requests.from_server(event);
    }
});
