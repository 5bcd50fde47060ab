//! The server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677) as in PostgreSQL: any user name, and no channel binding.

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{self, SHA256},
    hmac,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use postgres_protocol::{authentication::sasl::SCRAM_SHA_256, password::scram_sha_256};
use secrecy::{ExposeSecret, SecretString};
use zeroize::{Zeroize, Zeroizing};

/// Length of a SHA-256 digest.
const KEY_LEN: usize = 32;
/// Random bytes in the server's half of the nonce; PostgreSQL's `SCRAM_RAW_NONCE_LEN`.
const NONCE_LEN: usize = 18;

/// Keys derived from a password: enough to verify a proof, not enough to log in elsewhere.
pub struct Verifier {
    /// Salt and iterations as sent to clients: `s=...,i=...`.
    parameters: String,
    stored_key: [u8; KEY_LEN],
    server_key: [u8; KEY_LEN],
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.stored_key.zeroize();
        self.server_key.zeroize();
    }
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

/// Why an exchange failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// The proof is for another password.
    #[error("the proof does not match the password")]
    Wrong,
    /// A malformed message, or one that does not continue the exchange.
    #[error("malformed SCRAM message")]
    Malformed,
    /// Channel binding, an authorization identity or an extension, none of which is offered.
    #[error("the client requests a SCRAM feature that is not offered")]
    Unsupported,
}

impl Verifier {
    /// Derives the keys, which takes milliseconds by design. `None` if the library's format changes.
    pub fn new(password: &SecretString) -> Option<Self> {
        // SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key>
        let text = Zeroizing::new(scram_sha_256(password.expose_secret().as_bytes()));
        // The library offers the keys only as the text that PostgreSQL stores in pg_authid.
        let (costs, keys) = text
            .strip_prefix(SCRAM_SHA_256)?
            .strip_prefix('$')?
            .split_once('$')?;
        let (iterations, salt) = costs.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let key = |text: &str| STANDARD.decode(text).ok()?.try_into().ok();
        Some(Self {
            parameters: format!("s={salt},i={iterations}"),
            stored_key: key(stored_key)?,
            server_key: key(server_key)?,
        })
    }
}

/// An exchange after the server's first message.
#[derive(Debug)]
pub struct Exchange<'a> {
    verifier: &'a Verifier,
    /// RFC 5802's AuthMessage, up to the client's final message.
    transcript: String,
    /// The GS2 header of the client's first message, which its final message repeats.
    header: String,
    nonce: String,
}

impl<'a> Exchange<'a> {
    /// Parses the client's first message; returns the exchange and the server's first message.
    pub fn begin(verifier: &'a Verifier, first: &[u8]) -> Result<(Self, String), ScramError> {
        let random: [u8; NONCE_LEN] = rand::random();
        Self::begin_with(verifier, first, &STANDARD.encode(random))
    }

    fn begin_with(
        verifier: &'a Verifier,
        first: &[u8],
        our_nonce: &str,
    ) -> Result<(Self, String), ScramError> {
        let first = std::str::from_utf8(first).map_err(|_| ScramError::Malformed)?;
        let (binding, rest) = first.split_once(',').ok_or(ScramError::Malformed)?;
        let (identity, bare) = rest.split_once(',').ok_or(ScramError::Malformed)?;
        match binding {
            // `y`: the client supports channel binding and saw that the server does not.
            "n" | "y" => {}
            binding if binding.starts_with("p=") => return Err(ScramError::Unsupported),
            _ => return Err(ScramError::Malformed),
        }
        // An authorization identity, which PostgreSQL refuses as well.
        if !identity.is_empty() {
            return Err(ScramError::Unsupported);
        }
        let mut attributes = bare.split(',');
        let user = attributes.next().unwrap_or_default();
        // RFC 5802, 5.1: a mandatory extension that is not known must fail the authentication.
        if user.starts_with("m=") {
            return Err(ScramError::Unsupported);
        }
        if !user.starts_with("n=") {
            return Err(ScramError::Malformed);
        }
        let client_nonce = attributes
            .next()
            .and_then(|attribute| attribute.strip_prefix("r="))
            .filter(|nonce| !nonce.is_empty() && nonce.bytes().all(|byte| byte.is_ascii_graphic()))
            .ok_or(ScramError::Malformed)?;
        // The user name is not compared: every client logs in as the role of the credential.
        let nonce = format!("{client_nonce}{our_nonce}");
        let answer = format!("r={nonce},{}", verifier.parameters);
        let exchange = Self {
            verifier,
            transcript: format!("{bare},{answer},"),
            header: format!("{binding},{identity},"),
            nonce,
        };
        Ok((exchange, answer))
    }

    /// Verifies the client's final message; returns the server's final message with its own proof.
    pub fn finish(mut self, last: &[u8]) -> Result<String, ScramError> {
        let last = std::str::from_utf8(last).map_err(|_| ScramError::Malformed)?;
        // RFC 5802, 5.1: the proof is the last attribute and signs all before it.
        let (unproved, proof) = last.rsplit_once(",p=").ok_or(ScramError::Malformed)?;
        let mut attributes = unproved.split(',');
        let channel = attributes.next().and_then(|it| it.strip_prefix("c="));
        let nonce = attributes.next().and_then(|it| it.strip_prefix("r="));
        // RFC 5802, 6: the repeated header reveals a party in between that removed channel binding.
        if channel != Some(STANDARD.encode(&self.header).as_str())
            || nonce != Some(self.nonce.as_str())
        {
            return Err(ScramError::Malformed);
        }
        let proof: [u8; KEY_LEN] = STANDARD
            .decode(proof)
            .ok()
            .and_then(|proof| proof.try_into().ok())
            .ok_or(ScramError::Malformed)?;
        self.transcript.push_str(unproved);

        // RFC 5802, 3: ClientProof XOR ClientSignature is the ClientKey, whose digest is the StoredKey.
        let signature = sign(&self.verifier.stored_key, &self.transcript);
        let mut client_key = proof;
        for (byte, signed) in client_key.iter_mut().zip(signature.as_ref()) {
            *byte ^= signed;
        }
        let found = digest::digest(&SHA256, &client_key);
        // The ClientKey would be enough to log in with (RFC 5802, 3).
        client_key.zeroize();
        verify_slices_are_equal(found.as_ref(), &self.verifier.stored_key)
            .map_err(|_| ScramError::Wrong)?;
        // Only after the client's proof: the server's proof would let a guess be checked offline.
        let ours = sign(&self.verifier.server_key, &self.transcript);
        Ok(format!("v={}", STANDARD.encode(ours)))
    }
}

fn sign(key: &[u8], text: &str) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
    use proptest::prelude::*;

    use super::*;

    fn verifier(password: &str) -> Verifier {
        Verifier::new(&SecretString::from(password)).unwrap()
    }

    /// Runs rust-postgres's client side against the server side.
    fn log_in(
        verifier: &Verifier,
        password: &str,
        binding: ChannelBinding,
    ) -> Result<(), ScramError> {
        let mut client = ScramSha256::new(password.as_bytes(), binding);
        let (exchange, answer) = Exchange::begin(verifier, client.message())?;
        client.update(answer.as_bytes()).unwrap();
        let proof = exchange.finish(client.message())?;
        client.finish(proof.as_bytes()).unwrap();
        Ok(())
    }

    #[test]
    fn the_right_password_authenticates_both_sides() {
        for password in [
            "sesame",
            "with, comma = and space",
            "pässwörd",
            "\u{ff21}\u{2168}",
            "💧",
        ] {
            let verifier = verifier(password);
            assert_eq!(
                log_in(&verifier, password, ChannelBinding::unsupported()),
                Ok(())
            );
            assert_eq!(
                log_in(&verifier, password, ChannelBinding::unrequested()),
                Ok(())
            );
            let wrong = log_in(&verifier, "another", ChannelBinding::unsupported());
            assert_eq!(wrong, Err(ScramError::Wrong));
        }
    }

    #[test]
    fn channel_binding_is_refused() {
        let bound = ChannelBinding::tls_server_end_point(vec![1; 32]);
        assert_eq!(
            log_in(&verifier("x"), "x", bound),
            Err(ScramError::Unsupported)
        );
    }

    /// RFC 7677, section 3.
    #[test]
    fn the_example_of_the_rfc_is_verified() {
        let salt = "W22ZaJ0SNY7soEsUEjb6gQ==";
        let salted = pbkdf2(b"pencil", &STANDARD.decode(salt).unwrap(), 4096);
        let key = |name: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &salted), name);
        let stored_key = digest::digest(&SHA256, key(b"Client Key").as_ref());
        let verifier = Verifier {
            parameters: format!("s={salt},i=4096"),
            stored_key: stored_key.as_ref().try_into().unwrap(),
            server_key: key(b"Server Key").as_ref().try_into().unwrap(),
        };
        let (exchange, answer) = Exchange::begin_with(
            &verifier,
            b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO",
            "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
        )
        .unwrap();
        assert_eq!(
            answer,
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        let proof = exchange.finish(
            b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
        );
        assert_eq!(
            proof.as_deref(),
            Ok("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
        );
    }

    fn pbkdf2(password: &[u8], salt: &[u8], iterations: u32) -> [u8; KEY_LEN] {
        let mut out = [0; KEY_LEN];
        aws_lc_rs::pbkdf2::derive(
            aws_lc_rs::pbkdf2::PBKDF2_HMAC_SHA256,
            std::num::NonZeroU32::new(iterations).unwrap(),
            salt,
            password,
            &mut out,
        );
        out
    }

    #[test]
    fn malformed_and_unsupported_messages_are_refused() {
        let verifier = verifier("x");
        let begin = |first: &[u8]| Exchange::begin(&verifier, first).unwrap_err();
        for malformed in [
            &b""[..],
            b"n",
            b"n,",
            b"n,,",
            b"n,,r=x",
            b"n,,n=,r=",
            b"n,,n=,r=a b",
            b"z,,n=,r=x",
            b"\xff,,",
        ] {
            assert_eq!(begin(malformed), ScramError::Malformed, "{malformed:?}");
        }
        for unsupported in [
            &b"p=tls-unique,,n=,r=x"[..],
            b"n,a=me,n=,r=x",
            b"n,,m=1,n=,r=x",
        ] {
            assert_eq!(begin(unsupported), ScramError::Unsupported);
        }
        let finish = |last: &str| {
            let (exchange, _) = Exchange::begin_with(&verifier, b"n,,n=,r=abc", "def").unwrap();
            exchange.finish(last.as_bytes()).unwrap_err()
        };
        let proof = STANDARD.encode([0; KEY_LEN]);
        assert_eq!(
            finish(&format!("c=biws,r=abcdef,p={proof}")),
            ScramError::Wrong
        );
        for malformed in [
            String::new(),
            "c=biws,r=abcdef".to_owned(),
            "c=biws,r=abcdef,p=AAAA".to_owned(),
            format!("c=biws,r=abc,p={proof}"),
            format!("c=eSws,r=abcdef,p={proof}"),
        ] {
            assert_eq!(finish(&malformed), ScramError::Malformed, "{malformed}");
        }
    }

    #[test]
    fn debug_output_holds_no_key() {
        assert_eq!(format!("{:?}", verifier("sesame")), "Verifier { .. }");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(first in prop::collection::vec(any::<u8>(), 0..60), last in ".{0,60}") {
            let verifier = Verifier { parameters: "s=AAAA,i=1".to_owned(), stored_key: [0; KEY_LEN], server_key: [0; KEY_LEN] };
            let _ = Exchange::begin(&verifier, &first);
            let (exchange, _) = Exchange::begin_with(&verifier, b"n,,n=,r=a", "b").unwrap();
            let _ = exchange.finish(last.as_bytes());
        }
    }
}
