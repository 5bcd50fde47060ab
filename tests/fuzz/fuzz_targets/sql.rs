//! SQL: statements are parts of the text in its order, and the search for words finds the same in pieces. The first byte
//! selects what a backslash is, the second one where the text is cut.
#![no_main]

use lakebase_proxy::protocol::{
    lexer::{Backslash, statements},
    words::{Search, Words, verdict},
};
use libfuzzer_sys::fuzz_target;

fn words(pieces: &[&[u8]]) -> Words {
    let mut words = Words::default();
    let mut search = Search::new();
    for piece in pieces {
        search.search(piece, |word, end| {
            assert!(end <= piece.len());
            words[word] = true;
        });
    }
    if let Some(word) = search.end() {
        words[word] = true;
    }
    words
}

fuzz_target!(|data: &[u8]| {
    let &[first, cut, ref text @ ..] = data else {
        return;
    };
    let backslash = if first % 2 == 0 {
        Backslash::Plain
    } else {
        Backslash::Escape
    };
    let mut rest = text;
    for statement in statements(text, backslash) {
        let tokens: usize = statement.tokens().map(|token| token.text.len()).sum();
        assert!((1..=statement.text.len()).contains(&tokens));
        let start = statement.text.as_ptr() as usize - rest.as_ptr() as usize;
        rest = &rest[start + statement.text.len()..];
    }
    verdict(text, backslash);
    let (one, other) = text.split_at(usize::from(cut).min(text.len()));
    assert_eq!(words(&[one, other]), words(&[text]));
});
