//! The workspace's REST API over HTTP on loopback.
//!
//! Every request passes, in this order: the guard against web pages, the count, the fault for its place, and then its
//! handler, which checks the token. Names of fields, codes and shapes are the platform's.

mod control;
mod credentials;
mod error;
mod guard;
mod instances;
mod oidc;
mod page;
mod resources;
mod rewrite;
mod socket;
mod vouchers;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{
        HeaderName, HeaderValue, StatusCode,
        header::{CONTENT_TYPE, DATE, RETRY_AFTER},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, patch, post},
};
use jiff::fmt::rfc2822::DateTimePrinter;
use tokio::net::TcpListener;

use super::{
    counts::Counts,
    faults::{self, Action, Site},
    shared::Shared,
};
use error::ApiError;
use socket::{BreakableListener, Breaker};

/// Serves until stopped.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let stop = shared.stop.clone().cancelled_owned();
    let service = router(shared).into_make_service_with_connect_info::<Breaker>();
    if let Err(error) = axum::serve(BreakableListener(listener), service)
        .with_graceful_shutdown(stop)
        .await
    {
        tracing::error!(%error, "the emulated workspace has stopped");
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/.well-known/databricks-config", get(oidc::host_metadata))
        .route(
            "/oidc/.well-known/oauth-authorization-server",
            get(oidc::discovery),
        )
        .route(
            "/oidc/.well-known/openid-configuration",
            get(oidc::discovery),
        )
        .route("/oidc/jwks.json", get(oidc::key_set))
        .route("/oidc/v1/token", post(oidc::token))
        .route("/api/2.0/postgres/credentials", post(credentials::mint))
        .route(
            "/api/2.0/postgres/{*name}",
            get(resources::get)
                .post(resources::post)
                .patch(resources::patch)
                .delete(resources::delete),
        )
        .route(
            "/api/2.0/database/credentials",
            post(credentials::mint_provisioned),
        )
        .route("/api/2.0/database/instances", get(instances::list))
        .route(
            "/api/2.0/database/instances:findByUid",
            get(instances::find_by_uid),
        )
        .route("/api/2.0/database/instances/{name}", get(instances::get))
        .route(
            "/api/2.0/database/instances/{name}/roles",
            get(instances::roles),
        )
        .route("/api/2.0/apps/{name}", get(instances::app))
        .route("/api/2.0/preview/scim/v2/Me", get(instances::me))
        .route("/aad/auth", get(vouchers::login_page))
        .route("/entra/{tenant}/oauth2/token", post(vouchers::entra_id))
        .route("/github/token", get(vouchers::github))
        .route(
            "/azure-devops/{organization}/{project}/_apis/distributedtask/hubs/{hub}/plans/{plan}/jobs/{job}/oidctoken",
            post(vouchers::azure_devops),
        )
        .route(
            "/metadata/identity/oauth2/token",
            get(vouchers::instance_metadata),
        )
        .route(
            "/metadata-service/{session}",
            get(vouchers::metadata_service),
        )
        .route("/emulator", get(control::overview))
        .route("/emulator/counts", get(control::counts))
        .route(
            "/emulator/faults",
            get(control::faults)
                .put(control::replace_faults)
                .post(control::add_faults)
                .delete(control::clear_faults),
        )
        .route("/emulator/settings", patch(control::change_settings))
        .route("/emulator/events", post(control::event))
        .fallback(unknown)
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), strike))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), stamp))
        .layer(middleware::from_fn(guard::guard))
        .with_state(shared)
}

async fn unknown(request: Request) -> ApiError {
    let message = format!(
        "No API found for '{} {}'",
        request.method(),
        request.uri().path()
    );
    ApiError::new(StatusCode::NOT_FOUND, "ENDPOINT_NOT_FOUND", message)
}

/// Counts a request, and answers it with the fault if one is due.
async fn strike(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(breaker): ConnectInfo<Breaker>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if path.starts_with("/emulator") {
        return next.run(request).await;
    }
    let (site, counter) = place(path);
    shared.counters.change(|counts| *counter(counts) += 1);
    let struck = match site {
        Some(site) => shared.faults.strike(site).await,
        None => None,
    };
    let Some(mut struck) = struck else {
        return next.run(request).await;
    };
    match struck.action {
        Action::Respond(response) => scripted(response),
        Action::Merge(changes) => rewrite::merge(next.run(request).await, &changes).await,
        Action::QuoteNumbers => rewrite::quote_numbers(next.run(request).await).await,
        Action::Blackhole => {
            breaker.blackhole();
            let _ = shared.stop.run_until_cancelled(struck.cleared.wait()).await;
            breaker.reset();
            StatusCode::OK.into_response()
        }
        Action::Stall => {
            let _ = shared.stop.run_until_cancelled(struck.cleared.wait()).await;
            next.run(request).await
        }
        Action::Reset => {
            breaker.reset();
            StatusCode::OK.into_response()
        }
        _ => {
            breaker.close();
            StatusCode::OK.into_response()
        }
    }
}

/// Which faults and which counter a path belongs to.
fn place(path: &str) -> (Option<Site>, fn(&mut Counts) -> &mut u64) {
    if path.contains("/.well-known/") || path == "/oidc/jwks.json" {
        (Some(Site::Discovery), |counts| &mut counts.discoveries)
    } else if path == "/oidc/v1/token" {
        (Some(Site::Token), |counts| &mut counts.token_requests)
    } else if path.ends_with("/credentials") {
        (Some(Site::Mint), |counts| &mut counts.mint_requests)
    } else if path.ends_with("/scim/v2/Me") {
        (Some(Site::Whoami), |counts| &mut counts.whoami_requests)
    } else if ["/api/2.0/postgres/", "/api/2.0/database/", "/api/2.0/apps/"]
        .iter()
        .any(|root| path.starts_with(root))
    {
        (Some(Site::Lookup), |counts| &mut counts.lookups)
    } else if [
        "/aad/",
        "/entra/",
        "/github/",
        "/azure-devops/",
        "/metadata/",
        "/metadata-service/",
    ]
    .iter()
    .any(|root| path.starts_with(root))
    {
        (Some(Site::Voucher), |counts| &mut counts.other_requests)
    } else {
        (None, |counts| &mut counts.other_requests)
    }
}

fn scripted(response: faults::Response) -> Response {
    let status = StatusCode::from_u16(response.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut answer = match response.body {
        None if status.is_success() => status.into_response(),
        None => ApiError::of_status(status).into_response(),
        Some(body) => {
            let mut answer = Response::new(Body::from(body));
            *answer.status_mut() = status;
            if let Ok(value) = HeaderValue::try_from(response.content_type) {
                answer.headers_mut().insert(CONTENT_TYPE, value);
            }
            answer
        }
    };
    if let Some(value) = response
        .retry_after
        .and_then(|value| HeaderValue::try_from(value).ok())
    {
        answer.headers_mut().insert(RETRY_AFTER, value);
    }
    answer
}

/// Headers of every answer: the workspace's clock, its id, the request's id.
async fn stamp(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let date = DateTimePrinter::new()
        .timestamp_to_rfc9110_string(&shared.now())
        .ok();
    let stamps = [
        (DATE, date),
        (
            HeaderName::from_static("x-databricks-org-id"),
            Some(shared.names.workspace_id.clone()),
        ),
        (error::REQUEST_ID, Some(error::request_id())),
    ];
    for (name, value) in stamps {
        if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
            response.headers_mut().entry(name).or_insert(value);
        }
    }
    response
}
