//! Authentication, and the login at Postgres that follows it.
//!
//! The token comes as a cleartext password inside TLS. Identity and expiry are judged here and only here: an open
//! session outlives its token. Roles and databases are Postgres's own business, whose words go to the client unchanged.

use std::{io, sync::Arc, time::Duration};

use postgres_protocol::authentication::{
    md5_hash,
    sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};
use tokio_rustls::server::TlsStream;

use super::{
    connection::{Ending, strike_login},
    error::ServerError,
    relay::Running,
    wire::{self, MAX_PASSWORD_LENGTH, Message, PROTOCOL_3_0, Parameters},
};
use crate::emulator::{
    compute::State,
    endpoint::Endpoint,
    faults::{Login, Site},
    identity::{Identity, random},
    postgres::{RoleKind, Stream},
    sessions::{BackendKey, Session},
    settings::WhileAsleep,
    shared::Shared,
    token::{Audience, TokenError},
};

/// How long a client may take over its password; Neon's proxy gives 15 seconds to authenticate.
const PASSWORD_TIMEOUT: Duration = Duration::from_secs(15);
/// How long Postgres may take over a login.
const BACKEND_TIMEOUT: Duration = Duration::from_mins(1);
/// A parameter that the front keeps to itself.
const HIDDEN_PARAMETER: &[u8] = b"upstream_ip\0";

type Client = TlsStream<TcpStream>;

/// Authenticates and logs in; the client has its `ReadyForQuery` when this returns. Not cancel safe.
pub(super) async fn run(
    client: &mut Client,
    server_name: &str,
    endpoint: &Arc<Endpoint>,
    parameters: &Parameters,
    shared: &Shared,
) -> Result<(Box<dyn Stream>, Running), Ending> {
    let Some(user) = parameters.find("user").filter(|user| !user.is_empty()) else {
        return Err(ServerError::proxy("Parameter 'user' is missing in startup packet.").into());
    };
    let is_native = shared.settings.borrow().native_login
        && endpoint
            .database
            .role(user)
            .await
            .is_ok_and(|role| role.kind == RoleKind::Native);
    let mut login = parameters.login();
    if !is_native {
        login.credential_age = authenticate(client, user, &login, endpoint, shared).await?;
    }
    if shared.settings.borrow().while_asleep == WhileAsleep::StartingUp
        && endpoint.compute.state() != State::Active
    {
        return Err(ServerError::starting_up().into());
    }
    let backend = timeout(
        BACKEND_TIMEOUT,
        backend(client, user, parameters, is_native, endpoint),
    )
    .await;
    let (server, session) = backend.unwrap_or_else(|_| Err(unreachable_compute()))?;
    endpoint.compute.touch();
    shared.tally.accepted(server_name, &login);
    shared.counters.change(|counts| counts.logins += 1);
    let fault = shared.faults.strike_login(Site::Session, &login).await;
    let running = Running {
        session,
        fault,
        endpoint: Arc::clone(endpoint),
    };
    Ok((server, running))
}

/// The built-in pooler supports native passwords only: it requests one by SCRAM, as PgBouncer does for roles it does not
/// know, and refuses whatever comes. Not cancel safe.
pub(super) async fn refuse_at_pooler(client: &mut Client) -> Ending {
    let exchange = async {
        let mechanisms = [&10_u32.to_be_bytes()[..], SCRAM_SHA_256.as_bytes(), b"\0\0"].concat();
        client.write_all(&wire::message(b'R', &mechanisms)).await?;
        client.flush().await?;
        let first = wire::read_message(client, MAX_PASSWORD_LENGTH).await?;
        let first = String::from_utf8_lossy(&first.body).into_owned();
        let nonce = first.rsplit_once("r=").map_or("", |(_, nonce)| nonce);
        let challenge = format!("r={nonce}pooler,s=cG9vbGVyLXNhbHQ=,i=4096");
        let challenge = [&11_u32.to_be_bytes()[..], challenge.as_bytes()].concat();
        client.write_all(&wire::message(b'R', &challenge)).await?;
        client.flush().await?;
        wire::read_message(client, MAX_PASSWORD_LENGTH).await
    };
    match timeout(PASSWORD_TIMEOUT, exchange).await {
        Ok(Ok(_)) => ServerError::fatal("08P01", "SASL authentication failed").into(),
        Ok(Err(error)) => Ending::from(error),
        Err(_) => ServerError::fatal("08P01", "client_login_timeout (server down)").into(),
    }
}

/// Requests and checks the token; returns its age in seconds.
async fn authenticate(
    client: &mut Client,
    user: &str,
    login: &Login<'_>,
    endpoint: &Endpoint,
    shared: &Shared,
) -> Result<Option<i64>, Ending> {
    client
        .write_all(&wire::message(b'R', &3_u32.to_be_bytes()))
        .await?;
    client.flush().await?;
    let Ok(answer) = timeout(
        PASSWORD_TIMEOUT,
        wire::read_message(client, MAX_PASSWORD_LENGTH),
    )
    .await
    else {
        return Err(ServerError::proxy("Authentication timed out").into());
    };
    let Message { kind: b'p', body } = answer? else {
        return Err(ServerError::fatal("08P01", "expected a password response").into());
    };
    shared.counters.change(|counts| counts.passwords += 1);
    // Bytes that are no text are no JWT either.
    let password = body
        .strip_suffix(b"\0")
        .and_then(|text| std::str::from_utf8(text).ok())
        .unwrap_or_default();
    let now = shared.now();
    let verified = shared.signer.verify(password, Audience::Database, now);
    let issued = verified.as_ref().ok().map(|claims| claims.iat);
    let credential_age = issued.map(|issued| now.as_second().saturating_sub(issued));
    let login = Login {
        credential_age,
        ..*login
    };
    strike_login(shared, Site::Password, &login).await?;
    let claims = verified.map_err(|error: TokenError| ServerError::proxy(error.to_string()))?;
    if shared.is_revoked(&claims, Audience::Database) {
        return Err(ServerError::identity().into());
    }
    let Some(identity) = shared.identities.by_name(&claims.sub) else {
        return Err(ServerError::identity().into());
    };
    let role = endpoint
        .database
        .role(user)
        .await
        .map_err(|_| unreachable_compute())?;
    let is_owner = identity.name == user;
    if login
        .database
        .is_some_and(|database| shared.lacks_extension(database))
    {
        let message = format!("password authentication failed for user \"{user}\"");
        return Err(ServerError::fatal("28P01", message).into());
    }
    match role.kind {
        RoleKind::OAuth | RoleKind::Plain
            if is_owner && (role.label.is_some() || role.kind == RoleKind::OAuth) =>
        {
            check_label(role.label.as_deref(), identity, user)?;
            Ok(credential_age)
        }
        RoleKind::Missing if is_owner => Ok(credential_age),
        RoleKind::Group if identity.groups.iter().any(|group| group == user) => Ok(credential_age),
        RoleKind::Plain | RoleKind::Native if is_owner => {
            Err(ServerError::password_failed(user).into())
        }
        _ => Err(ServerError::identity().into()),
    }
}

/// An OAuth role is bound to one identity by its security label.
fn check_label(label: Option<&str>, identity: &Identity, user: &str) -> Result<(), Ending> {
    let bound = label
        .and_then(|label| label.split(',').next())
        .and_then(|id| id.strip_prefix("id="));
    let message = match bound {
        Some(id) if id == identity.id => return Ok(()),
        Some(_) => format!(
            "token's identity \"{}\" did not match the security label configured for role \"{user}\"",
            identity.name
        ),
        None => format!("no security label is configured for role \"{user}\""),
    };
    Err(ServerError::fatal("28P01", message).into())
}

/// Logs in at Postgres and passes its welcome on, with the cancel key replaced.
async fn backend(
    client: &mut Client,
    user: &str,
    parameters: &Parameters,
    is_native: bool,
    endpoint: &Endpoint,
) -> Result<(Box<dyn Stream>, Session), Ending> {
    let mut server = endpoint
        .database
        .dial()
        .await
        .map_err(|_| unreachable_compute())?;
    server
        .write_all(&wire::packet(
            PROTOCOL_3_0,
            &parameters.forwarded(endpoint.is_read_only),
        ))
        .await?;
    let mut welcome = Vec::new();
    let mut session = None;
    loop {
        let message = match wire::read_backend(&mut server).await {
            Ok(message) => message,
            Err(_) if welcome.is_empty() => return Err(unreachable_compute()),
            Err(_) => return Err(Ending::Send(welcome)),
        };
        match message.kind {
            b'R' if wire::word(&message.body) == Some(0) => welcome.extend(message.encode()),
            b'R' if is_native => pass_challenge(client, &mut server, &message).await?,
            b'R' => {
                let password = endpoint.database.role_password().unwrap_or_default();
                answer_challenge(&mut server, &message.body, user, password).await?;
            }
            b'K' => {
                let (key, entered) = replace_key(&message.body, endpoint)?;
                welcome.extend(wire::message(b'K', &key));
                session = Some(entered);
            }
            b'S' if message.body.starts_with(HIDDEN_PARAMETER) => {}
            b'E' => {
                welcome.extend(message.encode());
                return Err(Ending::Send(welcome));
            }
            b'Z' => {
                welcome.extend(message.encode());
                break;
            }
            _ => welcome.extend(message.encode()),
        }
    }
    let session = session.ok_or_else(unreachable_compute)?;
    if endpoint.compute.state() == State::Idle {
        // It fell asleep meanwhile, and did not know of this session to end.
        return Err(ServerError::proxy("endpoint is idle, retry request").into());
    }
    client.write_all(&welcome).await?;
    client.flush().await?;
    Ok((server, session))
}

/// Native login: the client answers Postgres itself.
async fn pass_challenge(
    client: &mut Client,
    server: &mut Box<dyn Stream>,
    challenge: &Message,
) -> Result<(), Ending> {
    client.write_all(&challenge.encode()).await?;
    client.flush().await?;
    let is_final = wire::word(&challenge.body) == Some(12);
    if !is_final {
        let Ok(answer) = timeout(
            PASSWORD_TIMEOUT,
            wire::read_message(client, MAX_PASSWORD_LENGTH),
        )
        .await
        else {
            return Err(ServerError::proxy("Authentication timed out").into());
        };
        server.write_all(&answer?.encode()).await?;
    }
    Ok(())
}

/// A server that is not ours wants the role's password from us.
async fn answer_challenge(
    server: &mut Box<dyn Stream>,
    challenge: &[u8],
    user: &str,
    password: &str,
) -> Result<(), Ending> {
    match (wire::word(challenge), challenge.get(4..)) {
        (Some(3), _) => send_password(server, format!("{password}\0").as_bytes()).await?,
        (Some(5), Some(salt)) => {
            let salt = salt
                .try_into()
                .map_err(|_| wire::invalid("short md5 salt"))?;
            let hash = md5_hash(user.as_bytes(), password.as_bytes(), salt);
            send_password(server, format!("{hash}\0").as_bytes()).await?;
        }
        (Some(10), _) => scram(server, password).await?,
        _ => return Err(unreachable_compute()),
    }
    Ok(())
}

async fn scram(server: &mut Box<dyn Stream>, password: &str) -> Result<(), Ending> {
    let mut exchange = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
    let first = exchange.message();
    let length = u32::try_from(first.len()).unwrap_or_default().to_be_bytes();
    let initial = [SCRAM_SHA_256.as_bytes(), b"\0", &length, first].concat();
    send_password(server, &initial).await?;
    for step in [11, 12] {
        let message = wire::read_backend(server).await?;
        if message.kind == b'E' {
            return Err(Ending::Send(message.encode()));
        }
        if message.kind != b'R' || wire::word(&message.body) != Some(step) {
            return Err(unreachable_compute());
        }
        let data = message.body.get(4..).unwrap_or_default();
        if step == 11 {
            exchange.update(data)?;
            send_password(server, exchange.message()).await?;
        } else {
            exchange.finish(data)?;
        }
    }
    Ok(())
}

async fn send_password(server: &mut Box<dyn Stream>, body: &[u8]) -> io::Result<()> {
    server.write_all(&wire::message(b'p', body)).await
}

/// Gives the client a random key that stands for Postgres's.
fn replace_key(body: &[u8], endpoint: &Endpoint) -> Result<([u8; 8], Session), Ending> {
    let process_id = wire::word(body).ok_or_else(unreachable_compute)?;
    let backend = BackendKey {
        process_id,
        secret: body.get(4..).unwrap_or_default().to_vec(),
    };
    let key = random().map_err(|_| unreachable_compute())?;
    let session = endpoint
        .sessions
        .enter(key, backend)
        .ok_or_else(unreachable_compute)?;
    Ok((key, session))
}

fn unreachable_compute() -> Ending {
    ServerError::proxy("Couldn't connect to compute node").into()
}
