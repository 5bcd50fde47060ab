//! Answering a server's question for a password.

use postgres_protocol::authentication::{
    md5_hash, sasl::ChannelBinding, sasl::SCRAM_SHA_256, sasl::ScramSha256,
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::frame::tag;

/// Rounds of hashing that we do for a server; PostgreSQL's default is 4,096. A million takes about half a second.
const MAX_SCRAM_ITERATIONS: u64 = 1_000_000;

/// What a server asks for at login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthenticationRequest {
    /// The password as it is.
    Cleartext,
    /// The password, hashed with this salt.
    Md5([u8; 4]),
    /// Nothing more: welcome.
    Ok,
    /// One of these SASL mechanisms.
    Sasl(Vec<String>),
    /// The server's turn in a SASL exchange.
    SaslContinue(Vec<u8>),
    /// The server's last word in a SASL exchange.
    SaslFinal(Vec<u8>),
    /// Something else (Kerberos, GSSAPI, SSPI, ...).
    Unsupported(u32),
}

impl AuthenticationRequest {
    /// Reads the body of an Authentication message; `None` if it is malformed.
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
        .take_while(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).ok())
        .collect()
}

/// Why a server's question could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A way to log in that we do not speak.
    #[error("the server asks for authentication method {0}, which is not supported")]
    Unsupported(String),
    /// A turn in the exchange that makes no sense.
    #[error("the server's authentication exchange is out of order")]
    OutOfOrder,
    /// More rounds of hashing than any server has use for.
    #[error("the server asks for {0} SCRAM iterations, which would keep everybody waiting")]
    TooCostly(u64),
    /// The server does not know the password either, or garbles the exchange.
    #[error("the SCRAM exchange with the server failed")]
    Scram(#[source] std::io::Error),
}

/// One login's side of the exchange.
pub struct Authenticator<'a> {
    user: &'a str,
    password: &'a SecretString,
    scram: Option<ScramSha256>,
    /// An exchange has begun.
    is_scram: bool,
    verified: bool,
}

impl<'a> Authenticator<'a> {
    /// Answers for `user` with `password`.
    pub fn new(user: &'a str, password: &'a SecretString) -> Self {
        Self {
            user,
            password,
            scram: None,
            is_scram: false,
            verified: false,
        }
    }

    /// The hashing that the server's turn in an exchange asks for, to be done away from the threads that serve clients;
    /// [`derived`](Self::derived) takes its result.
    ///
    /// # Errors
    /// A turn out of order, and more rounds than are done for any server.
    pub fn derivation(&mut self, server_first: Vec<u8>) -> Result<Derivation, AuthError> {
        let iterations = iterations(&server_first);
        if iterations > MAX_SCRAM_ITERATIONS {
            return Err(AuthError::TooCostly(iterations));
        }
        Ok(Derivation {
            scram: self.scram.take().ok_or(AuthError::OutOfOrder)?,
            server_first,
        })
    }

    /// The answer to the turn that the derivation was for.
    pub fn derived(&mut self, Derived(scram): Derived) -> Zeroizing<Vec<u8>> {
        let scram = self.scram.insert(scram);
        frame(scram.message())
    }

    /// The answer to send: a whole frame, or nothing when it is the server's turn again.
    ///
    /// # Errors
    /// A method we lack, or an exchange that went wrong.
    pub fn answer(
        &mut self,
        request: AuthenticationRequest,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, AuthError> {
        match request {
            // A SCRAM exchange that the server cuts short has not proved who the server is.
            AuthenticationRequest::Ok if self.is_scram && !self.verified => {
                Err(AuthError::OutOfOrder)
            }
            AuthenticationRequest::Ok => Ok(None),
            AuthenticationRequest::Cleartext => {
                Ok(Some(password(self.password.expose_secret().as_bytes())))
            }
            AuthenticationRequest::Md5(salt) => {
                let hash = md5_hash(
                    self.user.as_bytes(),
                    self.password.expose_secret().as_bytes(),
                    salt,
                );
                Ok(Some(password(hash.as_bytes())))
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
                self.is_scram = true;
                let scram = self.scram.insert(ScramSha256::new(
                    self.password.expose_secret().as_bytes(),
                    ChannelBinding::unsupported(),
                ));
                Ok(Some(sasl_initial(SCRAM_SHA_256, scram.message())))
            }
            AuthenticationRequest::SaslContinue(data) => {
                let derived = self.derivation(data)?.run()?;
                Ok(Some(self.derived(derived)))
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

/// An exchange in which the key is yet to be derived from the password, by as many rounds as the server asks for.
pub struct Derivation {
    scram: ScramSha256,
    server_first: Vec<u8>,
}

/// An exchange with its key.
pub struct Derived(ScramSha256);

impl Derivation {
    /// Blocks for up to half a second.
    ///
    /// # Errors
    /// A turn that makes no sense.
    pub fn run(mut self) -> Result<Derived, AuthError> {
        let updated = self.scram.update(&self.server_first);
        updated.map_err(AuthError::Scram)?;
        Ok(Derived(self.scram))
    }
}

/// The `i=` of a server's first SCRAM message (RFC 5802); what is no number is left to the exchange to refuse.
fn iterations(server_first: &[u8]) -> u64 {
    let attribute = server_first
        .split(|&byte| byte == b',')
        .find_map(|attribute| attribute.strip_prefix(b"i="));
    std::str::from_utf8(attribute.unwrap_or_default())
        .ok()
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

fn password(secret: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut body = Zeroizing::new(Vec::with_capacity(secret.len() + 1));
    body.extend_from_slice(secret);
    body.push(0);
    frame(&body)
}

fn sasl_initial(mechanism: &str, data: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut body = Vec::with_capacity(mechanism.len() + data.len() + 5);
    body.extend_from_slice(mechanism.as_bytes());
    body.push(0);
    body.extend_from_slice(&i32::try_from(data.len()).unwrap_or(i32::MAX).to_be_bytes());
    body.extend_from_slice(data);
    frame(&body)
}

fn frame(body: &[u8]) -> Zeroizing<Vec<u8>> {
    // Sized up front: growing would leave a copy of the secret behind.
    let mut out = Zeroizing::new(Vec::with_capacity(body.len() + 5));
    out.push(tag::PASSWORD);
    out.extend_from_slice(
        &u32::try_from(body.len() + 4)
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    out.extend_from_slice(body);
    out
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
    fn a_server_cannot_keep_us_hashing() {
        let secret = SecretString::from("x");
        let mut authenticator = Authenticator::new("me", &secret);
        let request = AuthenticationRequest::parse(b"\0\0\0\x0aSCRAM-SHA-256\0\0").unwrap();
        let first = authenticator.answer(request).unwrap().unwrap();
        let nonce = first.rsplit(|&byte| byte == b'=').next().unwrap();
        let reply = [b"r=", nonce, b"more,s=c2FsdA==,i=4294967295"].concat();
        assert!(matches!(
            authenticator.answer(AuthenticationRequest::SaslContinue(reply)),
            Err(AuthError::TooCostly(4_294_967_295))
        ));
    }

    #[test]
    fn methods_we_lack_are_named() {
        let secret = SecretString::from("x");
        let request = AuthenticationRequest::parse(b"\0\0\0\x07").unwrap();
        let error = Authenticator::new("me", &secret)
            .answer(request)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the server asks for authentication method 7, which is not supported"
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
