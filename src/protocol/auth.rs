//! The client's side of authentication at a server: cleartext, MD5 and SCRAM-SHA-256.

use std::io;

use bytes::BytesMut;
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    },
    message::frontend,
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

/// Upper limit of SCRAM iterations: that of `postgres-protocol`, about 50 ms of CPU time. PostgreSQL's default is 4,096.
const MAX_SCRAM_ITERATIONS: u64 = 100_000;

/// An Authentication message of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthenticationRequest {
    /// Requests the password in cleartext.
    Cleartext,
    /// Requests the password, hashed with this salt.
    Md5([u8; 4]),
    /// Authentication is complete.
    Ok,
    /// Requests one of these SASL mechanisms.
    Sasl(Vec<String>),
    /// The server's first SASL message.
    SaslContinue(Vec<u8>),
    /// The server's final SASL message.
    SaslFinal(Vec<u8>),
    /// Another method (Kerberos, GSSAPI, SSPI, ...).
    Unsupported(u32),
}

impl AuthenticationRequest {
    /// Parses the body of an Authentication message; `None` if it is malformed.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let (code, rest) = body.split_first_chunk::<4>()?;
        Some(match u32::from_be_bytes(*code) {
            0 => Self::Ok,
            3 => Self::Cleartext,
            5 => Self::Md5(rest.try_into().ok()?),
            10 => Self::Sasl(mechanisms(rest)?),
            11 => Self::SaslContinue(rest.to_vec()),
            12 => Self::SaslFinal(rest.to_vec()),
            other => Self::Unsupported(other),
        })
    }
}

fn mechanisms(list: &[u8]) -> Option<Vec<String>> {
    list.split(|&byte| byte == 0)
        // An empty name ends the list (AuthenticationSASL in "Message Formats").
        .take_while(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).ok())
        .collect()
}

/// Why authentication at a server failed.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A method that the proxy does not implement.
    #[error("the server requests authentication method {0}, which is not supported")]
    Unsupported(String),
    /// A message that does not fit the state of the exchange.
    #[error("the server's authentication exchange is out of order")]
    OutOfOrder,
    /// More SCRAM iterations than the limit.
    #[error(
        "the server requests {0} SCRAM iterations, more than the limit of {MAX_SCRAM_ITERATIONS}"
    )]
    TooCostly(u64),
    /// The server's proof is wrong or malformed.
    #[error("the SCRAM exchange with the server failed")]
    Scram(#[source] io::Error),
    /// Cleartext passwords end at their first zero byte.
    #[error("the password contains a zero byte")]
    ZeroByte,
}

/// The client's side of one authentication.
pub struct Authenticator<'a> {
    user: &'a str,
    password: &'a SecretString,
    scram: Option<ScramSha256>,
    /// The server has requested SCRAM.
    scram_requested: bool,
    verified: bool,
}

impl<'a> Authenticator<'a> {
    /// Authenticates `user` with `password`.
    pub fn new(user: &'a str, password: &'a SecretString) -> Self {
        Self {
            user,
            password,
            scram: None,
            scram_requested: false,
            verified: false,
        }
    }

    /// The key derivation that the server's first SCRAM message requires, to run on a blocking thread; its result goes to
    /// [`derived`](Self::derived).
    ///
    /// # Errors
    /// A message out of order, and more iterations than the limit.
    pub fn derivation(&mut self, server_first: Vec<u8>) -> Result<Derivation, AuthError> {
        // Read before the exchange sees the message: the library derives the key while it parses.
        let iterations = iterations(&server_first);
        if iterations > MAX_SCRAM_ITERATIONS {
            return Err(AuthError::TooCostly(iterations));
        }
        Ok(Derivation {
            // Taken, so that a second message of this kind is out of order.
            scram: self.scram.take().ok_or(AuthError::OutOfOrder)?,
            server_first,
        })
    }

    /// The response to the server's first SCRAM message.
    pub fn derived(&mut self, Derived(scram): Derived) -> Result<Zeroizing<Vec<u8>>, AuthError> {
        let proof = self.scram.insert(scram).message();
        secret_message(proof.len(), |out| frontend::sasl_response(proof, out))
    }

    /// The response to send, a whole frame; `None` if the server sends the next message.
    ///
    /// # Errors
    /// A method that is not implemented, or a failed exchange.
    pub fn answer(
        &mut self,
        request: AuthenticationRequest,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, AuthError> {
        match request {
            // A server that ends a SCRAM exchange early has not proved that it knows the password.
            AuthenticationRequest::Ok if self.scram_requested && !self.verified => {
                Err(AuthError::OutOfOrder)
            }
            AuthenticationRequest::Ok => Ok(None),
            AuthenticationRequest::Cleartext => {
                let password = self.password.expose_secret().as_bytes();
                password_message(password).map(Some)
            }
            AuthenticationRequest::Md5(salt) => {
                let hash = md5_hash(
                    self.user.as_bytes(),
                    self.password.expose_secret().as_bytes(),
                    salt,
                );
                password_message(hash.as_bytes()).map(Some)
            }
            AuthenticationRequest::Sasl(mechanisms) => {
                if !mechanisms
                    .iter()
                    .any(|mechanism| mechanism == SCRAM_SHA_256)
                {
                    return Err(AuthError::Unsupported(format!(
                        "SASL ({})",
                        mechanisms.join(", ")
                    )));
                }
                self.scram_requested = true;
                let scram = self.scram.insert(ScramSha256::new(
                    self.password.expose_secret().as_bytes(),
                    ChannelBinding::unsupported(),
                ));
                let first = scram.message();
                let message = secret_message(first.len(), |out| {
                    frontend::sasl_initial_response(SCRAM_SHA_256, first, out)
                });
                message.map(Some)
            }
            AuthenticationRequest::SaslContinue(data) => {
                let derived = self.derivation(data)?.run()?;
                self.derived(derived).map(Some)
            }
            AuthenticationRequest::SaslFinal(data) => {
                let scram = self.scram.as_mut().ok_or(AuthError::OutOfOrder)?;
                scram.finish(&data).map_err(AuthError::Scram)?;
                self.verified = true;
                Ok(None)
            }
            AuthenticationRequest::Unsupported(code) => {
                Err(AuthError::Unsupported(code.to_string()))
            }
        }
    }
}

/// An exchange before its key is derived from the password.
pub struct Derivation {
    scram: ScramSha256,
    server_first: Vec<u8>,
}

/// An exchange with its derived key.
pub struct Derived(ScramSha256);

impl Derivation {
    /// Derives the key. Blocks for up to 50 ms, at 100,000 iterations.
    ///
    /// # Errors
    /// A malformed message of the server.
    pub fn run(mut self) -> Result<Derived, AuthError> {
        let updated = self.scram.update(&self.server_first);
        updated.map_err(AuthError::Scram)?;
        Ok(Derived(self.scram))
    }
}

/// The `i=` of a server's first SCRAM message (RFC 5802). The exchange itself refuses anything but a number.
fn iterations(server_first: &[u8]) -> u64 {
    let attribute = server_first
        .split(|&byte| byte == b',')
        .find_map(|attribute| attribute.strip_prefix(b"i="));
    std::str::from_utf8(attribute.unwrap_or_default())
        .ok()
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

fn password_message(password: &[u8]) -> Result<Zeroizing<Vec<u8>>, AuthError> {
    secret_message(password.len(), |out| {
        frontend::password_message(password, out)
    })
}

/// A message with a secret in it. The buffer has its final size from the start: growing would leave a copy behind.
fn secret_message(
    secret_len: usize,
    encode: impl FnOnce(&mut BytesMut) -> io::Result<()>,
) -> Result<Zeroizing<Vec<u8>>, AuthError> {
    // Mechanism name, lengths and terminators take less than 64 bytes.
    let mut out = BytesMut::with_capacity(secret_len + 64);
    encode(&mut out).map_err(|_| AuthError::ZeroByte)?;
    // Takes over the allocation.
    Ok(Zeroizing::new(out.into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn cleartext_is_a_password_message() {
        let secret = SecretString::from("token");
        let answer = Authenticator::new("me", &secret)
            .answer(AuthenticationRequest::Cleartext)
            .unwrap()
            .unwrap();
        assert_eq!(&answer[..], b"p\0\0\0\x0atoken\0");
    }

    #[test]
    fn a_password_with_a_zero_byte_is_refused() {
        let secret = SecretString::from("to\0ken");
        let answer = Authenticator::new("me", &secret).answer(AuthenticationRequest::Cleartext);
        assert!(matches!(answer, Err(AuthError::ZeroByte)));
    }

    #[test]
    fn md5_is_salted() {
        let secret = SecretString::from("password");
        let answer = Authenticator::new("md5_user", &secret)
            .answer(AuthenticationRequest::Md5([0x2a, 0x3d, 0x8f, 0xe0]))
            .unwrap()
            .unwrap();
        assert_eq!(&answer[5..], b"md562af4dd09bbb41884907a838a3233294\0");
    }

    #[test]
    fn a_scram_exchange_cut_short_is_refused() {
        let secret = SecretString::from("x");
        let mut authenticator = Authenticator::new("me", &secret);
        let request =
            AuthenticationRequest::parse(b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
                .unwrap();
        assert!(authenticator.answer(request).unwrap().is_some());
        assert!(matches!(
            authenticator.answer(AuthenticationRequest::Ok),
            Err(AuthError::OutOfOrder)
        ));
    }

    #[test]
    fn scram_iterations_are_limited() {
        let secret = SecretString::from("x");
        let answer = |iterations: u64| {
            let mut authenticator = Authenticator::new("me", &secret);
            let request = AuthenticationRequest::parse(b"\0\0\0\x0aSCRAM-SHA-256\0\0").unwrap();
            let first = authenticator.answer(request).unwrap().unwrap();
            // The nonce may contain any printable character but a comma, `=` as well.
            let nonce = first.windows(2).position(|two| two == b"r=").unwrap();
            let rest = format!("more,s=c2FsdA==,i={iterations}");
            let reply = [&first[nonce..], rest.as_bytes()].concat();
            authenticator.answer(AuthenticationRequest::SaslContinue(reply))
        };
        assert!(answer(100_000).is_ok());
        for iterations in [100_001, 1_000_000, 4_294_967_295] {
            assert!(matches!(
                answer(iterations),
                Err(AuthError::TooCostly(found)) if found == iterations
            ));
        }
    }

    #[test]
    fn unsupported_methods_are_named() {
        let secret = SecretString::from("x");
        let request = AuthenticationRequest::parse(b"\0\0\0\x07").unwrap();
        let error = Authenticator::new("me", &secret)
            .answer(request)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the server requests authentication method 7, which is not supported"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let secret = SecretString::from("x");
            let mut authenticator = Authenticator::new("me", &secret);
            if let Some(request) = AuthenticationRequest::parse(&bytes) {
                let _ = authenticator.answer(request);
            }
            let _ = authenticator.answer(AuthenticationRequest::SaslContinue(bytes.clone()));
            let _ = authenticator.answer(AuthenticationRequest::SaslFinal(bytes));
        }
    }
}
