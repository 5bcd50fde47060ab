//! Workspace and credential rooms against the emulator's workspace API.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use lakebase_proxy::{
    clock::Clock,
    config::{Roots, WorkspaceSettings},
    credential::{CallErrorKind, Cause, CredentialCell, Refresher},
    emulator::{Action, Emulator, EmulatorOptions, Identity, Response, Site},
    net::tls,
    telemetry::Metrics,
    workspace::{CredentialMinter, EndpointState, Target, Workspace},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

fn workspace(settings: WorkspaceSettings) -> Workspace {
    let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1).unwrap();
    Workspace::new(settings, &tls, Clock::system(), Metrics::new().unwrap()).unwrap()
}

fn m2m(emulator: &Emulator, identity: &Identity) -> WorkspaceSettings {
    WorkspaceSettings {
        host: Some(emulator.workspace_url().to_owned()),
        client_id: Some(identity.name.clone()),
        client_secret: identity.client_secret.clone(),
        ..WorkspaceSettings::default()
    }
}

fn endpoint(emulator: &Emulator) -> Target {
    Target::Endpoint(emulator.endpoint_name().parse().unwrap())
}

fn remaining(expires_at: Option<Timestamp>) -> SignedDuration {
    expires_at.unwrap().duration_since(Timestamp::now())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_identity_gets_its_credential_or_refusal() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let identities = emulator.identities();

    // The app's service principal: who it is, where the endpoint is, and a credential of an hour.
    let app = workspace(m2m(&emulator, &identities.app));
    assert_eq!(app.profile().await.unwrap().user_name, identities.app.name);
    let info = app.describe(&endpoint(&emulator)).await.unwrap();
    assert_eq!(info.host.as_deref(), Some("localhost"));
    assert_eq!(info.state, EndpointState::Active);
    let minted = CredentialMinter::new(app.clone(), endpoint(&emulator))
        .request_credential()
        .await
        .unwrap();
    assert_eq!(minted.secret.expose_secret().split('.').count(), 3);
    let left = remaining(minted.expires_at);
    assert!(
        left > SignedDuration::from_mins(59) && left < SignedDuration::from_mins(61),
        "{left}"
    );
    assert_eq!(
        emulator.counts().tokens_issued,
        1,
        "one workspace token serves all calls"
    );

    // The same through the older product's API.
    let instance = Target::Instance(emulator.instance_name().parse().unwrap());
    CredentialMinter::new(app.clone(), instance.clone())
        .request_credential()
        .await
        .unwrap();
    assert!(app.describe(&instance).await.unwrap().host.is_some());

    // A person with a personal access token.
    let settings = WorkspaceSettings {
        host: Some(emulator.workspace_url().to_owned()),
        token: identities.user.pat.clone(),
        ..WorkspaceSettings::default()
    };
    let person = workspace(settings);
    assert_eq!(
        person.profile().await.unwrap().user_name,
        identities.user.name
    );
    CredentialMinter::new(person, endpoint(&emulator))
        .request_credential()
        .await
        .unwrap();

    // A workspace whose clock is ahead does not shorten or lengthen what we count.
    emulator.configure(|settings| settings.clock_skew_seconds = 600);
    let minted = CredentialMinter::new(app.clone(), endpoint(&emulator))
        .request_credential()
        .await
        .unwrap();
    let left = remaining(minted.expires_at);
    assert!(
        left > SignedDuration::from_mins(59) && left < SignedDuration::from_mins(61),
        "{left}"
    );
    emulator.configure(|settings| settings.clock_skew_seconds = 0);

    // A workspace token that is revoked before its time costs one more, not a failure.
    let issued = emulator.counts().tokens_issued;
    emulator.revoke_workspace_tokens();
    CredentialMinter::new(app.clone(), endpoint(&emulator))
        .request_credential()
        .await
        .unwrap();
    assert_eq!(emulator.counts().tokens_issued, issued + 1);

    // Refusals, each with its fix.
    let mut wrong = m2m(&emulator, &identities.app);
    wrong.client_secret = Some(SecretString::from("not-the-secret"));
    let unknown = Target::Endpoint(
        "projects/none/branches/production/endpoints/primary"
            .parse()
            .unwrap(),
    );
    for (settings, target, fix) in [
        (wrong, endpoint(&emulator), "DATABRICKS_CLIENT_SECRET"),
        (
            m2m(&emulator, &identities.unentitled),
            endpoint(&emulator),
            "Workspace access",
        ),
        (m2m(&emulator, &identities.app), unknown, "ENDPOINT_NAME"),
    ] {
        let error = CredentialMinter::new(workspace(settings), target)
            .request_credential()
            .await
            .unwrap_err();
        assert_eq!(error.kind, CallErrorKind::Refused, "{error:?}");
        assert!(
            error.hint.as_deref().unwrap_or_default().contains(fix),
            "{error:?}"
        );
    }
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresher_survives_an_outage_and_serves_all_rejected_clients_with_one_mint() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    emulator
        .faults()
        .once(Site::Token, Action::Respond(Response::status(503)));
    emulator.faults().once(
        Site::Mint,
        Action::Respond(Response::status(429).retry_after("1")),
    );
    emulator.faults().once(Site::Mint, Action::Reset);

    let workspace = workspace(m2m(&emulator, &emulator.identities().app));
    let cell = CredentialCell::new(Clock::system());
    let minter = CredentialMinter::new(workspace, endpoint(&emulator));
    let refresher = Refresher::new(Arc::new(minter), cell.clone(), Metrics::new().unwrap());
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(refresher.run(stop.clone()));

    let deadline = Instant::now() + Duration::from_secs(30);
    let first = cell.get(deadline).await.unwrap();
    assert_eq!(first.generation, 1);
    assert_eq!(emulator.counts().mint_requests, 3);
    assert_eq!(emulator.counts().tokens_issued, 1);

    let cause = Cause::login("app", "databricks_postgres", false);
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        let cell = cell.clone();
        clients.spawn(async move {
            cell.wait_for_newer(1, cause, deadline)
                .await
                .unwrap()
                .generation
        });
    }
    while let Some(generation) = clients.join_next().await {
        assert_eq!(generation.unwrap(), 2);
    }
    assert_eq!(emulator.counts().credentials_issued, 2);
    stop.cancel();
    tasks.join_next().await.unwrap().unwrap();
    emulator.stop().await;
}
