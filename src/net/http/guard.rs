//! Refuses requests that web pages of other origins cause.
//!
//! A browser on this machine reaches loopback, and so does any page in it. Three properties that a page cannot forge
//! identify such a request: a `Host` that does not name this machine (DNS rebinding needs a name), an `Origin` that is not
//! ours, and fetch metadata, which browsers omit for addresses such as 0.0.0.0 that lead to loopback too.
//!
//! This protects reads. A request with an effect must show its intent as well, see [`check_intent`].

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version,
        header::{
            ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, HOST, ORIGIN, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
        request::Parts,
        uri::Authority,
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

/// No scripts, no frames, no forms; styles and images from us alone. A page that needs more sets its own policy.
const POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// Sent with every answer, also a refusal.
const HARDENING: [(HeaderName, &str); 7] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
];

/// The header by which a GET shows that no page sent it: pages of other origins cannot add it without being allowed to.
const INTENT: &str = "x-requested-with";

/// Refuses a request with an effect that a page of another origin may have caused: a navigation, whatever it is embedded
/// in, and every GET or HEAD without the header `X-Requested-With`.
///
/// POST needs no header, as browsers name their page's origin with it. A page that had its name rebound is of our own
/// origin to its browser: from a browser, and by GET, only addresses and `localhost` are right.
pub fn check_intent(request: &Parts) -> Result<(), Response> {
    let headers = &request.headers;
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    let has_origin = headers.contains_key(ORIGIN);
    let is_rebound = || host(request).is_ok_and(|host| host.is_some_and(|host| is_name(&host)));
    // `same-site` is foreign as well: it includes every other port of this machine.
    if !matches!(site, None | Some(b"none" | b"same-origin")) {
        return Err(FOREIGN.into_response());
    }
    match request.method {
        Method::POST if has_origin && is_rebound() => Err(FOREIGN.into_response()),
        Method::POST => Ok(()),
        Method::GET if headers.contains_key(INTENT) && is_rebound() => Err(FOREIGN.into_response()),
        Method::GET if headers.contains_key(INTENT) => Ok(()),
        _ => {
            let message =
                "this has an effect: send a POST, or a GET with the header X-Requested-With\n";
            let refused = (StatusCode::METHOD_NOT_ALLOWED, message);
            Err(([(ALLOW, "POST")], refused).into_response())
        }
    }
}

/// Whether a link or a script of another site leads a browser here, on a loopback listener. On others links are normal:
/// people come through a reverse proxy that authenticates them.
pub fn is_led_from_another_site(request: &Parts) -> bool {
    let site = request.headers.get("sec-fetch-site");
    is_on_loopback(request) && site.is_some_and(|site| site != "none" && site != "same-origin")
}

/// Whether the listener of a request is bound to loopback, so that only this machine's names lead to it.
pub fn is_on_loopback(request: &Parts) -> bool {
    request.extensions.get() == Some(&Reach::Loopback)
}

/// Whether a request was made on this machine, and by a name or address of this machine's. On a listener that others
/// reach, a page that had its name rebound to a loopback address would otherwise be accepted for the address it comes from.
pub fn is_from_this_machine(request: &Parts) -> bool {
    request
        .extensions
        .get()
        .is_some_and(|visitor: &Visitor| visitor.is_local())
        && host(request).is_ok_and(|host| host.is_none_or(|host| is_local(&host)))
}

/// The address of the client; an extension of each request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visitor(pub(super) SocketAddr);

impl Visitor {
    /// Whether the request comes from this machine.
    fn is_local(self) -> bool {
        self.0.ip().to_canonical().is_loopback()
    }
}

/// Who may be expected at a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Bound to a loopback address: only this machine's names are right.
    Loopback,
    /// Reached from elsewhere, under names that we cannot know (a pod's, a reverse proxy's).
    Network,
}

/// The middleware: refuses what is foreign, hardens every answer.
pub(super) async fn guard(State(reach): State<Reach>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    parts.extensions.insert(reach);
    let mut response = match judge(reach, &parts) {
        Ok(()) => next.run(Request::from_parts(parts, body)).await,
        Err(refusal) => refusal.into_response(),
    };
    for (name, value) in HARDENING {
        response
            .headers_mut()
            // A page may have set its own policy.
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    response
}

type Refusal = (StatusCode, &'static str);

const FOREIGN: Refusal = (
    StatusCode::FORBIDDEN,
    "requests from other origins are refused\n",
);

fn judge(reach: Reach, request: &Parts) -> Result<(), Refusal> {
    let host = host(request)?;
    if reach == Reach::Loopback
        && let Some(host) = &host
        && !is_local(host)
    {
        return Err((
            StatusCode::MISDIRECTED_REQUEST,
            "this address answers to localhost only\n",
        ));
    }
    if !origin_is_ours(&request.headers, host.as_ref())
        || embeds_us(&request.method, &request.headers)
    {
        return Err(FOREIGN);
    }
    Ok(())
}

/// The host that the request is for: the target's own when it has one (RFC 9112, 3.2.2), else the `Host` field.
fn host(request: &Parts) -> Result<Option<Authority>, Refusal> {
    let bad = (StatusCode::BAD_REQUEST, "one valid Host header is needed\n");
    let mut fields = request.headers.get_all(HOST).iter();
    let field = fields.next();
    // RFC 9112, 3.2: 400 for more than one, and for HTTP/1.1 without.
    if fields.next().is_some() || (field.is_none() && request.version == Version::HTTP_11) {
        return Err(bad);
    }
    let field = field
        .map(|value| Authority::try_from(value.as_bytes()))
        .transpose()
        .map_err(|_| bad)?;
    let host = request.uri.authority().cloned().or(field);
    if host
        .as_ref()
        // RFC 9110, 4.2.4: userinfo in an http URI is treated as an error.
        .is_some_and(|host| host.as_str().contains('@'))
    {
        return Err(bad);
    }
    Ok(host)
}

/// `localhost` or a loopback address. Other addresses may lead here too, 0.0.0.0 does, but nothing of ours names them, and
/// browsers do not send the origin of the page.
fn is_local(host: &Authority) -> bool {
    match literal(host) {
        Some(ip) => ip.to_canonical().is_loopback(),
        None => !is_name(host),
    }
}

/// A DNS name, which its owner can point at this machine.
fn is_name(host: &Authority) -> bool {
    literal(host).is_none() && !host.host().eq_ignore_ascii_case("localhost")
}

fn literal(host: &Authority) -> Option<IpAddr> {
    let name = host.host();
    // The brackets of an IPv6 literal (RFC 3986, 3.2.2).
    let inner = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    inner.unwrap_or(name).parse().ok()
}

/// True without an `Origin`, and for one that names the requested host. `null` (sandboxed frames, files) is foreign.
fn origin_is_ours(headers: &HeaderMap, host: Option<&Authority>) -> bool {
    headers.get_all(ORIGIN).iter().all(|origin| {
        let Ok(origin) = origin.to_str() else {
            return false;
        };
        // https: a reverse proxy may terminate TLS in front of us.
        let ours = origin
            .strip_prefix("http://")
            .or_else(|| origin.strip_prefix("https://"));
        ours.zip(host)
            .is_some_and(|(ours, host)| ours.eq_ignore_ascii_case(host.as_str()))
    })
}

/// Another site's page (or another port of this machine, which browsers call same-site) making a request of its own.
/// Following a link is a navigation and passes, since the page with the link cannot read the response.
fn embeds_us(method: &Method, headers: &HeaderMap) -> bool {
    let has = |name: &str, value: &str| headers.get(name).is_some_and(|field| field == value);
    if !has("sec-fetch-site", "cross-site") && !has("sec-fetch-site", "same-site") {
        return false;
    }
    let reads = method == Method::GET || method == Method::HEAD;
    !(reads && has("sec-fetch-mode", "navigate") && has("sec-fetch-dest", "document"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(reach: Reach, method: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (request, ()) = request.body(()).unwrap().into_parts();
        judge(reach, &request).map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn loopback_answers_to_localhost_and_addresses_whatever_the_port() {
        for host in [
            "localhost",
            "LOCALHOST:9090",
            "127.0.0.1",
            "127.0.0.1:80",
            "[::1]:9090",
            "[::1]",
            "127.8.8.8",
            "[::ffff:127.0.0.1]:80",
        ] {
            assert_eq!(
                verdict(Reach::Loopback, "GET", &[("host", host)]),
                200,
                "{host}"
            );
        }
        for host in [
            "rebound.example",
            "localhost.example:9090",
            "127.0.0.1.nip.io",
            "localhost.",
            "127.1",
            "0.0.0.0:9090",
            "[::]:9090",
            "8.8.8.8",
            "192.0.2.7:1",
            "[::ffff:0.0.0.0]",
        ] {
            assert_eq!(
                verdict(Reach::Loopback, "GET", &[("host", host)]),
                421,
                "{host}"
            );
            assert_eq!(
                verdict(Reach::Network, "GET", &[("host", host)]),
                200,
                "{host}"
            );
        }
    }

    #[test]
    fn a_host_must_be_there_once_and_make_sense() {
        assert_eq!(verdict(Reach::Loopback, "GET", &[]), 400);
        assert_eq!(verdict(Reach::Network, "GET", &[]), 400);
        assert_eq!(
            verdict(
                Reach::Loopback,
                "GET",
                &[("host", "localhost"), ("host", "localhost")]
            ),
            400
        );
        assert_eq!(
            verdict(Reach::Loopback, "GET", &[("host", "evil@localhost")]),
            400
        );
        assert_eq!(verdict(Reach::Loopback, "GET", &[("host", "a b")]), 400);
    }

    #[test]
    fn the_targets_own_authority_counts_before_the_host_field() {
        let request = Request::builder()
            .uri("http://rebound.example/")
            .header("host", "localhost");
        let (request, ()) = request.body(()).unwrap().into_parts();
        let refusal = judge(Reach::Loopback, &request).unwrap_err();
        assert_eq!(refusal.0, StatusCode::MISDIRECTED_REQUEST);
    }

    #[test]
    fn a_foreign_origin_gets_nothing_by_any_method() {
        for method in ["GET", "HEAD", "POST", "OPTIONS", "DELETE"] {
            for origin in [
                "http://evil.example",
                "http://localhost:3000",
                "null",
                "http://localhost:9090.evil.example",
            ] {
                let headers = [("host", "localhost:9090"), ("origin", origin)];
                assert_eq!(
                    verdict(Reach::Loopback, method, &headers),
                    403,
                    "{method} {origin}"
                );
                assert_eq!(
                    verdict(Reach::Network, method, &headers),
                    403,
                    "{method} {origin}"
                );
            }
            let ours = [
                ("host", "localhost:9090"),
                ("origin", "http://localhost:9090"),
            ];
            assert_eq!(verdict(Reach::Loopback, method, &ours), 200, "{method}");
        }
    }

    fn intent(method: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (request, ()) = request.body(()).unwrap().into_parts();
        check_intent(&request).map_or_else(|refused| refused.status().as_u16(), |()| 200)
    }

    #[test]
    fn an_effect_needs_a_post_or_a_header_that_no_foreign_page_can_send() {
        let header = ("x-requested-with", "curl");
        for host in ["localhost:9090", "10.0.0.7:9090"] {
            let host = ("host", host);
            assert_eq!(intent("POST", &[host]), 200);
            assert_eq!(intent("GET", &[host, header]), 200);
            for method in ["GET", "HEAD", "DELETE"] {
                assert_eq!(intent(method, &[host]), 405, "{method}");
            }
            for site in ["cross-site", "same-site", "nonsense"] {
                let site = ("sec-fetch-site", site);
                assert_eq!(intent("POST", &[host, site]), 403);
                assert_eq!(intent("GET", &[host, header, site]), 403);
            }
            for site in ["none", "same-origin"] {
                assert_eq!(intent("POST", &[host, ("sec-fetch-site", site)]), 200);
            }
        }
    }

    #[test]
    fn a_page_whose_name_leads_here_has_no_effect_either() {
        let host = ("host", "rebound.example:9090");
        let origin = ("origin", "http://rebound.example:9090");
        assert_eq!(intent("POST", &[host, origin]), 403);
        assert_eq!(intent("GET", &[host, ("x-requested-with", "x")]), 403);
        // A tool, by the name of a service.
        assert_eq!(
            intent("POST", &[("host", "lakebase-proxy.team.svc:9090")]),
            200
        );
        let ours = ("origin", "http://10.0.0.7:9090");
        assert_eq!(intent("POST", &[("host", "10.0.0.7:9090"), ours]), 200);
    }

    #[test]
    fn a_link_may_be_followed_but_nothing_embedded() {
        let from = |site, mode, dest| {
            [
                ("host", "localhost"),
                ("sec-fetch-site", site),
                ("sec-fetch-mode", mode),
                ("sec-fetch-dest", dest),
            ]
        };
        assert_eq!(
            verdict(
                Reach::Loopback,
                "GET",
                &from("cross-site", "navigate", "document")
            ),
            200
        );
        assert_eq!(
            verdict(
                Reach::Loopback,
                "GET",
                &from("cross-site", "navigate", "iframe")
            ),
            403
        );
        assert_eq!(
            verdict(
                Reach::Loopback,
                "GET",
                &from("same-site", "no-cors", "script")
            ),
            403
        );
        assert_eq!(
            verdict(
                Reach::Loopback,
                "POST",
                &from("cross-site", "navigate", "document")
            ),
            403
        );
        assert_eq!(
            verdict(
                Reach::Loopback,
                "GET",
                &from("same-origin", "no-cors", "style")
            ),
            200
        );
        assert_eq!(
            verdict(
                Reach::Loopback,
                "GET",
                &from("none", "navigate", "document")
            ),
            200
        );
    }
}
