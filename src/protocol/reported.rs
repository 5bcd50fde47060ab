//! The values of run-time parameters that a server reports (ParameterStatus).

use std::sync::OnceLock;

use bytes::{BufMut, Bytes, BytesMut};

use super::frame::{HEADER_LEN, Message, frame_body, tag, take_message};

/// The latest ParameterStatus of each parameter, as the server sent it.
#[derive(Debug, Default)]
pub(crate) struct Reported {
    latest: Vec<BytesMut>,
    /// All of them, for as long as none changes.
    frames: OnceLock<Bytes>,
}

impl Reported {
    /// Those in `frames`, whole messages one after the other.
    pub(crate) fn parse(frames: &[u8]) -> Self {
        let mut frames = BytesMut::from(frames);
        let mut reported = Self::default();
        while let Ok(Some(message)) = take_message(&mut frames, usize::MAX) {
            reported.record(&message);
        }
        reported
    }

    /// Records a ParameterStatus in place of an earlier one.
    pub(crate) fn record(&mut self, message: &Message) {
        let name = strings(&message.frame).next().unwrap_or_default();
        self.frames = OnceLock::new();
        let earlier = self
            .latest
            .iter_mut()
            .find(|frame| strings(frame).next() == Some(name));
        // A copy: a part of a larger buffer would keep all of that.
        let latest = BytesMut::from(&message.frame[..]);
        match earlier {
            Some(earlier) => *earlier = latest,
            None => self.latest.push(latest),
        }
    }

    /// Records a ParameterStatus. Returns its name and the value before, if that was another.
    pub(crate) fn replace(&mut self, frame: &[u8]) -> Option<(String, Option<Vec<u8>>)> {
        let mut parts = strings(frame);
        let name = str::from_utf8(parts.next()?).ok()?.to_owned();
        let before = self.value(&name).map(<[u8]>::to_vec);
        if before.as_deref() == parts.next() {
            return None;
        }
        self.record(&Message {
            tag: tag::PARAMETER_STATUS,
            frame: BytesMut::from(frame),
        });
        Some((name, before))
    }

    /// The messages that make another's values these.
    pub(crate) fn difference(&self, other: &Self) -> BytesMut {
        let mut frames = BytesMut::new();
        for frame in self
            .latest
            .iter()
            .filter(|frame| !other.latest.contains(frame))
        {
            frames.extend_from_slice(frame);
        }
        frames
    }

    /// The value of a parameter.
    pub(crate) fn value(&self, name: &str) -> Option<&[u8]> {
        self.latest.iter().find_map(|frame| {
            let mut strings = strings(frame);
            (strings.next() == Some(name.as_bytes())).then(|| strings.next())?
        })
    }

    /// The names of all, as far as they are UTF-8.
    pub(crate) fn names(&self) -> Vec<String> {
        let names = self.latest.iter().filter_map(|frame| strings(frame).next());
        let names = names.filter_map(|name| str::from_utf8(name).ok());
        names.map(str::to_owned).collect()
    }

    /// Sets the value of a parameter.
    pub(crate) fn set(&mut self, name: &str, value: &[u8]) {
        let body = [name.as_bytes(), b"\0", value, b"\0"].concat();
        if let Some(frame) = encode(&body) {
            self.record(&Message {
                tag: tag::PARAMETER_STATUS,
                frame,
            });
        }
    }

    /// All of them, as messages. Their readers share the memory.
    pub(crate) fn frames(&self) -> Bytes {
        self.frames
            .get_or_init(|| self.latest.concat().into())
            .clone()
    }
}

fn encode(body: &[u8]) -> Option<BytesMut> {
    let length = u32::try_from(body.len()).ok()?.checked_add(4)?;
    let mut frame = BytesMut::with_capacity(HEADER_LEN + body.len());
    frame.put_u8(tag::PARAMETER_STATUS);
    frame.put_u32(length);
    frame.put_slice(body);
    Some(frame)
}

fn strings(frame: &[u8]) -> impl Iterator<Item = &[u8]> {
    frame_body(frame).split(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::frame;

    #[test]
    fn the_latest_value_of_each_parameter_counts() {
        let status = |text: &[u8]| frame(b'S', text);
        let frames = [status(b"TimeZone\0UTC\0"), status(b"DateStyle\0ISO, MDY\0")].concat();
        let mut reported = Reported::parse(&frames);
        assert_eq!(reported.value("TimeZone"), Some(&b"UTC"[..]));
        assert_eq!(reported.value("timezone"), None);
        assert_eq!(&reported.frames()[..], frames);
        let mut later = BytesMut::from(&status(b"TimeZone\0Asia/Tokyo\0")[..]);
        reported.record(&take_message(&mut later, 100).unwrap().unwrap());
        assert_eq!(reported.value("TimeZone"), Some(&b"Asia/Tokyo"[..]));
        let expected = [
            status(b"TimeZone\0Asia/Tokyo\0"),
            status(b"DateStyle\0ISO, MDY\0"),
        ];
        assert_eq!(&reported.frames()[..], expected.concat());
    }
}
