//! Keeps web pages out: a loopback server is reachable by any page in the user's browser.

use axum::{
    extract::Request,
    http::{
        HeaderMap, StatusCode,
        header::{HOST, ORIGIN},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

/// Refuses a `Host` that is neither `localhost` nor a loopback address (421), and any request of a foreign page (403).
pub(super) async fn guard(request: Request, next: Next) -> Response {
    match refusal(request.headers()) {
        None => next.run(request).await,
        Some((status, text)) => (status, text).into_response(),
    }
}

fn refusal(headers: &HeaderMap) -> Option<(StatusCode, &'static str)> {
    let text = |name: &str| {
        headers
            .get(name)
            .map(|value| value.to_str().unwrap_or_default())
    };
    let host = text(HOST.as_str()).unwrap_or_default();
    if !is_local_name(host) {
        return Some((
            StatusCode::MISDIRECTED_REQUEST,
            "this host is not served here\n",
        ));
    }
    let is_foreign_origin =
        text(ORIGIN.as_str()).is_some_and(|origin| origin.strip_prefix("http://") != Some(host));
    let is_cross_site =
        text("sec-fetch-site").is_some_and(|site| !matches!(site, "same-origin" | "none"));
    (is_foreign_origin || is_cross_site).then_some((
        StatusCode::FORBIDDEN,
        "requests from other sites are refused\n",
    ))
}

/// `localhost` or a loopback address, with or without a port: the emulator listens nowhere else, and browsers do not send
/// the origin of a page that requests 0.0.0.0, which leads to loopback, too.
fn is_local_name(host: &str) -> bool {
    let (name, rest) = match host.strip_prefix('[') {
        Some(literal) => literal.split_once(']').unwrap_or_default(),
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let is_port = |rest: &str| {
        rest.strip_prefix(':')
            .is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
    };
    (rest.is_empty() || is_port(rest))
        && (name.eq_ignore_ascii_case("localhost")
            || name
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.to_canonical().is_loopback()))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn verdict(pairs: &[(&'static str, &'static str)]) -> Option<StatusCode> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, HeaderValue::from_static(value));
        }
        refusal(&headers).map(|(status, _)| status)
    }

    #[test]
    fn local_names_and_addresses_pass() {
        for host in [
            "localhost:8080",
            "LOCALHOST",
            "127.0.0.1:1",
            "[::1]:1",
            "[::1]",
        ] {
            assert_eq!(verdict(&[("host", host)]), None, "{host}");
        }
    }

    #[test]
    fn a_rebound_name_is_refused() {
        for host in [
            "evil.example",
            "localhost.evil.example:80",
            "",
            "127.0.0.1.evil.example",
            "127.0.0.1:80@evil.example",
            "[::1",
            "[::1].evil.example",
            "0.0.0.0:80",
            "8.8.8.8",
        ] {
            assert_eq!(
                verdict(&[("host", host)]),
                Some(StatusCode::MISDIRECTED_REQUEST),
                "{host}"
            );
        }
    }

    #[test]
    fn a_foreign_page_is_refused_and_our_own_origin_is_not() {
        let host = ("host", "127.0.0.1:80");
        assert_eq!(
            verdict(&[host, ("origin", "https://evil.example")]),
            Some(StatusCode::FORBIDDEN)
        );
        assert_eq!(
            verdict(&[host, ("origin", "null")]),
            Some(StatusCode::FORBIDDEN)
        );
        assert_eq!(
            verdict(&[host, ("sec-fetch-site", "cross-site")]),
            Some(StatusCode::FORBIDDEN)
        );
        assert_eq!(
            verdict(&[
                host,
                ("origin", "http://127.0.0.1:80"),
                ("sec-fetch-site", "same-origin")
            ]),
            None
        );
    }

    proptest::proptest! {
        #[test]
        fn no_host_makes_it_panic(host: String) {
            let _ = is_local_name(&host);
        }
    }
}
