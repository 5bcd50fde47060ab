//! For tests and tests/fuzz: the protocol of one client of the console, without a proxy.

use std::{
    pin::pin,
    task::{Context, Poll, Waker},
};

use super::{
    control::Command,
    dialogue::Backend,
    table::{Rows, Table},
};
use crate::protocol::{error::Report, rows::Value};

/// A backend that has three rows in every table, and nothing to change.
pub(super) struct Fixed;

impl Backend for Fixed {
    fn rows(&self, _: &Table) -> Rows {
        (1..=3).map(|n| vec![Value::Number(n)]).collect()
    }

    async fn control(&self, _: &Command) -> Result<(), Report> {
        Ok(())
    }
}

/// The result of what waits for nothing.
pub(super) fn now<T>(ready: impl Future<Output = T>) -> T {
    match pin!(ready).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("it waits"),
    }
}

/// Each message is answered in whole frames; Query and Sync end in one ReadyForQuery, and nothing else has one. After an
/// error of the extended protocol nothing is answered up to the next Sync, as by Postgres, not even a Query.
#[cfg(fuzzing)]
pub fn conversation(data: &[u8]) {
    use bytes::BytesMut;

    use super::dialogue::Dialogue;
    use crate::protocol::frame::{tag, take_message};

    let mut dialogue = Dialogue::new(Fixed);
    let mut is_skipping = false;
    let mut input = BytesMut::from(data);
    while let Ok(Some(message)) = take_message(&mut input, 10_000) {
        if message.tag == tag::TERMINATE {
            return;
        }
        let mut out = BytesMut::new();
        now(dialogue.handle(&message, &mut out));
        let mut answers = Vec::new();
        while let Some(answer) = take_message(&mut out, usize::MAX).expect("a frame") {
            answers.push(answer.tag);
        }
        assert!(out.is_empty(), "half a message");
        if message.tag == tag::SYNC {
            is_skipping = false;
        }
        if is_skipping {
            assert!(answers.is_empty(), "{answers:?}");
            continue;
        }
        let ready = answers.iter().filter(|tag| **tag == b'Z').count();
        let is_end = matches!(message.tag, tag::QUERY | tag::SYNC);
        assert_eq!(ready, usize::from(is_end), "{:?}", message.tag);
        assert!(ready == 0 || answers.last() == Some(&b'Z'));
        is_skipping = !is_end && answers.contains(&b'E');
    }
}
