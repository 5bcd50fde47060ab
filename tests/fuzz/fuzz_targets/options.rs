//! Start-up parameters folded into `options`: the server reads back every name and value as the client sent it, behind the
//! client's own options. The input is a list of names and values, each ended by a zero byte.
#![no_main]

use bytes::BytesMut;
use lakebase_proxy::protocol::{
    options::LoginParameters,
    startup::{InitialPacket, StartupMessage, take_initial_packet},
};
use libfuzzer_sys::fuzz_target;

/// What PostgreSQL makes of an `options` string: it splits at C's `isspace()`, and a backslash keeps what follows it.
fn split(options: &str) -> Vec<String> {
    let is_space = |character: char| character.is_ascii_whitespace() || character == '\u{b}';
    let (mut words, mut word) = (Vec::new(), None::<String>);
    let mut characters = options.chars();
    while let Some(character) = characters.next() {
        if is_space(character) {
            words.extend(word.take());
        } else if character == '\\' {
            word.get_or_insert_default().extend(characters.next());
        } else {
            word.get_or_insert_default().push(character);
        }
    }
    words.extend(word);
    words
}

/// Whether it is for us to carry.
fn is_ours(name: &str) -> bool {
    !matches!(
        name,
        "user" | "database" | "options" | "application_name" | "replication"
    )
}

fuzz_target!(|data: &str| {
    let mut strings = data.split('\0');
    let mut parameters = Vec::new();
    while let (Some(name), Some(value)) = (strings.next(), strings.next()) {
        if !name.is_empty() {
            parameters.push((name.to_owned(), value.to_owned()));
        }
    }
    let message = StartupMessage {
        minor: 0,
        parameters,
        protocol_options: Vec::new(),
    };
    let settings = LoginParameters::new(&message, "db".to_owned());
    let Ok(packet) = settings.startup("me", |_| false) else {
        return;
    };
    let own = message.parameter("options").unwrap_or_default();
    let mut expected = split(own);
    // A lone backslash is a word, and an error, only where nothing of ours follows.
    let ours = !settings.folded.is_empty();
    if ours && own.ends_with('\\') && expected.last().is_some_and(String::is_empty) {
        expected.pop();
    }
    for (name, value) in &message.parameters {
        if is_ours(name) && !settings.unusable.contains(name) {
            expected.extend(["-c".to_owned(), format!("{name}={value}")]);
        }
    }
    let Ok(Some(InitialPacket::Startup(sent))) =
        take_initial_packet(&mut BytesMut::from(&packet[..]))
    else {
        panic!("not a startup message")
    };
    assert_eq!(
        split(sent.parameter("options").unwrap_or_default()),
        expected
    );
});
