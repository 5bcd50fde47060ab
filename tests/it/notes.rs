//! The notes page, as a reader meets it: with notes, without, and while the database sleeps or refuses.

use std::{net::SocketAddr, time::Duration};

use lakebase_proxy::notes::{self, NotesOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use crate::{
    harness::{emulator::http, eventually, port::ReservedPort},
    postgres::Cluster,
    web::{get, request},
};

struct Site {
    address: SocketAddr,
    tasks: TaskTracker,
    stop: CancellationToken,
    _stop: DropGuard,
}

/// The page, reading through `options.upstream`.
async fn site(options: NotesOptions) -> Site {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(notes::serve(listener, options, stop.clone()));
    Site {
        address,
        tasks,
        _stop: stop.clone().drop_guard(),
        stop,
    }
}

/// The page on a database of a cluster, as a superuser.
fn options(upstream: SocketAddr, database: &str) -> NotesOptions {
    NotesOptions {
        database: Some(database.to_owned()),
        user: Some("postgres".to_owned()),
        ..NotesOptions::new(upstream)
    }
}

#[tokio::test]
async fn the_five_newest_notes_show_newest_first_and_as_text() {
    let cluster = Cluster::start().await;
    let front = cluster.front().await;
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute(
            "CREATE TABLE notes (id serial PRIMARY KEY, content text NOT NULL, created_at timestamp DEFAULT now());
             INSERT INTO notes (content, created_at) VALUES
                 ('too old', '2020-01-01'),
                 ('<script>alert(1)</script> & <b>bold</b>', '2026-01-02 03:04:05.678'),
                 ('Welcome', '2026-01-03'), ('same moment, later row', '2026-01-03'),
                 ('no time', NULL),
                 ('for ever', 'infinity'),
                 ('ünïcødé ✓ ' || chr(10) || 'second line', '2026-01-04');",
        )
        .await
        .unwrap();
    let site = site(options(front.address, "postgres")).await;

    let page = get(site.address, "/").await;
    assert_eq!(page.status, 200);
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert!(page.body.contains("Hello from Lakebase!") && page.body.contains("Recent Notes"));
    let expected = [
        "for ever",
        "ünïcødé ✓ \nsecond line",
        "same moment, later row",
        "Welcome",
        "&#60;script&#62;alert(1)&#60;/script&#62; &#38; &#60;b&#62;bold&#60;/b&#62;",
    ];
    let places: Vec<_> = expected.iter().map(|text| page.body.find(text)).collect();
    assert!(
        places.iter().all(Option::is_some) && places.is_sorted(),
        "{places:?} in {}",
        page.body
    );
    assert!(
        !page.body.contains("too old")
            && !page.body.contains("no time")
            && !page.body.contains("<script")
    );
    assert!(
        page.body
            .contains(r#"<time datetime="2026-01-02T03:04:05Z">2 January 2026, 03:04 UTC</time>"#)
    );

    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.contains("default-src 'none'") && !policy.contains("unsafe"),
        "{policy}"
    );
    assert_eq!(page.header("refresh"), None);
    let head = request(site.address, "HEAD", "/", &[("Host", "localhost")]).await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));

    // The same time with a time zone is the same time.
    admin
        .batch_execute(
            "ALTER TABLE notes ALTER created_at TYPE timestamptz USING created_at AT TIME ZONE 'UTC'; DELETE FROM notes \
             WHERE id <> 2",
        )
        .await
        .unwrap();
    let page = get(site.address, "/").await;
    assert!(
        page.body
            .contains(r#"<time datetime="2026-01-02T03:04:05Z">"#),
        "{}",
        page.body
    );

    admin.batch_execute("DELETE FROM notes").await.unwrap();
    let page = get(site.address, "/").await;
    assert_eq!(page.status, 200);
    assert!(page.body.contains("No notes yet"));
}

#[tokio::test]
async fn a_table_that_lacks_or_may_not_be_read_is_named_and_heals_by_itself() {
    let cluster = Cluster::start().await;
    let front = cluster.front().await;
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute("CREATE ROLE reader LOGIN")
        .await
        .unwrap();
    let site = site(NotesOptions {
        user: Some("reader".to_owned()),
        ..options(front.address, "postgres")
    })
    .await;
    let steps = [
        ("SELECT 1", 503, "There is no notes table yet"),
        (
            "CREATE TABLE notes (id int, content text, created_at timestamp)",
            503,
            "The notes may not be read",
        ),
        (
            "GRANT SELECT ON notes TO reader; ALTER TABLE notes RENAME content TO body",
            503,
            "looks different",
        ),
        (
            "ALTER TABLE notes RENAME body TO content",
            200,
            "No notes yet",
        ),
    ];
    for (statement, status, words) in steps {
        admin.batch_execute(statement).await.unwrap();
        let page = get(site.address, "/").await;
        assert_eq!(page.status, status, "{statement}");
        assert!(page.body.contains(words), "{statement}: {}", page.body);
        assert_eq!(
            page.header("retry-after").is_some(),
            status == 503,
            "{statement}"
        );
        assert!(
            !page.body.contains("42"),
            "codes are for the log: {}",
            page.body
        );
    }
    assert_eq!(front.opened(), 1, "one connection served all of it");
}

#[tokio::test]
async fn an_idle_connection_is_let_go_so_that_the_database_may_sleep() {
    let cluster = Cluster::start().await;
    let front = cluster.front().await;
    let idle_timeout = Duration::from_millis(600);
    let site = site(NotesOptions {
        idle_timeout,
        ..options(front.address, "postgres")
    })
    .await;
    get(site.address, "/").await;
    let since = Instant::now();
    assert_eq!(front.open(), 1, "kept for the next reader");
    let closed = eventually("the idle connection is closed", async || {
        (front.open() == 0).then_some(())
    });
    timeout(Duration::from_secs(20), closed)
        .await
        .expect("the idle connection is closed");
    assert!(
        since.elapsed() < idle_timeout * 4,
        "closed after {:?}",
        since.elapsed()
    );
    for _ in 0..5 {
        assert_eq!(get(site.address, "/healthz").await.body, "ok\n");
    }
    assert_eq!(front.opened(), 1, "health checks send nothing");
}

#[tokio::test]
async fn a_connection_that_the_server_ended_costs_the_reader_nothing() {
    let cluster = Cluster::start().await;
    let front = cluster.front().await;
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute("CREATE TABLE notes (id int, content text, created_at timestamp)")
        .await
        .unwrap();
    let site = site(options(front.address, "postgres")).await;
    for round in 1..=5 {
        assert_eq!(get(site.address, "/").await.status, 200, "round {round}");
        let ended = admin
            .query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE '%notes'", &[])
            .await;
        assert_eq!(ended.unwrap().len(), 1);
    }
}

#[tokio::test]
async fn a_table_that_is_locked_does_not_hold_the_reader_up() {
    let cluster = Cluster::start().await;
    let front = cluster.front().await;
    let admin = cluster.connect("postgres").await;
    let table = "CREATE TABLE notes (id int, content text, created_at timestamp)";
    admin.batch_execute(table).await.unwrap();
    admin
        .batch_execute("BEGIN; LOCK TABLE notes")
        .await
        .unwrap();
    let request_timeout = Duration::from_secs(1);
    let site = site(NotesOptions {
        request_timeout,
        ..options(front.address, "postgres")
    })
    .await;
    let page = timeout(Duration::from_secs(10), get(site.address, "/"))
        .await
        .expect("bounded");
    assert_eq!(page.status, 503);
    assert!(page.body.contains("taking too long"), "{}", page.body);
    admin.batch_execute("COMMIT").await.unwrap();
    assert_eq!(get(site.address, "/").await.status, 200);
}

#[tokio::test]
async fn stopping_sends_terminate_to_the_database() {
    let cluster = Cluster::start().await;
    let front = cluster.front().await;
    let site = site(options(front.address, "postgres")).await;
    get(site.address, "/").await;
    assert_eq!(front.open(), 1);
    site.stop.cancel();
    site.tasks.close();
    timeout(Duration::from_secs(10), site.tasks.wait())
        .await
        .expect("it ends");
    let closed = eventually("its connection is closed", async || {
        (front.open() == 0).then_some(())
    });
    timeout(Duration::from_secs(5), closed)
        .await
        .expect("its connection is closed");
}

/// A server that answers each startup message with this message, or with nothing.
async fn scripted(
    reply: Option<(&'static str, &'static str)>,
) -> (SocketAddr, mpsc::UnboundedReceiver<()>, TaskTracker) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (left, gone) = mpsc::unbounded_channel();
    let tasks = TaskTracker::new();
    let sessions = tasks.clone();
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let left = left.clone();
            sessions.spawn(async move {
                refuse(stream, reply).await;
                left.send(()).ok();
            });
        }
    });
    (address, gone, tasks)
}

async fn refuse(mut stream: TcpStream, reply: Option<(&str, &str)>) {
    let length = stream.read_u32().await.unwrap();
    let mut startup = vec![0; length as usize - 4];
    stream.read_exact(&mut startup).await.unwrap();
    if let Some((code, message)) = reply {
        let fields = format!("SFATAL\0VFATAL\0C{code}\0M{message}\0\0");
        let mut error = vec![b'E'];
        error.extend(u32::try_from(fields.len() + 4).unwrap().to_be_bytes());
        error.extend(fields.as_bytes());
        stream.write_all(&error).await.unwrap();
    }
    stream.read_to_end(&mut Vec::new()).await.ok();
}

#[tokio::test]
async fn a_refused_login_is_explained_without_the_servers_message() {
    for (code, words, retry_after) in [
        ("57P03", "The database is waking up", "5"),
        ("08001", "The database is waking up", "5"),
        ("53300", "The database is busy", "5"),
        ("28000", "did not accept the login", "30"),
        ("3D000", "There is no such database", "30"),
        ("XX000", "The notes cannot be shown", "30"),
    ] {
        let (address, _gone, _tasks) =
            scripted(Some((code, "host ep-secret-1234 answers <no>"))).await;
        let site = site(NotesOptions::new(address)).await;
        let page = get(site.address, "/").await;
        assert_eq!(page.status, 503, "{code}");
        assert_eq!(page.header("retry-after"), Some(retry_after), "{code}");
        assert!(page.body.contains(words), "{code}: {}", page.body);
        assert!(
            !page.body.contains("ep-secret") && !page.body.contains(code),
            "{code}: {}",
            page.body
        );
    }
}

#[tokio::test]
async fn a_sleeping_database_is_waited_for_within_bounds_and_not_held_awake() {
    let (address, mut gone, _tasks) = scripted(None).await;
    let request_timeout = Duration::from_millis(500);
    let site = site(NotesOptions {
        request_timeout,
        ..NotesOptions::new(address)
    })
    .await;
    let page = timeout(Duration::from_secs(10), get(site.address, "/"))
        .await
        .expect("bounded");
    assert_eq!((page.status, page.header("retry-after")), (503, Some("5")));
    assert!(
        page.body.contains("The database is waking up"),
        "{}",
        page.body
    );
    timeout(Duration::from_secs(5), gone.recv())
        .await
        .expect("the attempt is not left behind");
}

#[tokio::test]
async fn without_a_proxy_the_page_reports_that_and_recovers_later() {
    let closed = ReservedPort::new();
    let site = site(NotesOptions::new(closed.address())).await;
    let page = get(site.address, "/").await;
    assert_eq!(page.status, 503);
    assert!(
        page.body.contains("The proxy is not taking connections"),
        "{}",
        page.body
    );
    assert_eq!(get(site.address, "/healthz").await.status, 200);
}

#[tokio::test]
async fn a_note_is_added_by_the_page_s_own_form_and_by_no_other_page() {
    let cluster = Cluster::start().await;
    let front = cluster.front().await;
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute("CREATE TABLE notes (id serial PRIMARY KEY, content text NOT NULL, created_at timestamp DEFAULT now())")
        .await
        .unwrap();
    let site = site(options(front.address, "postgres")).await;
    let port = site.address.port();
    let submit = async |headers: String, content: &str| {
        let head = format!("POST /\ncontent-type: application/x-www-form-urlencoded\n{headers}");
        let answer = http(port, &head, &format!("content={content}"))
            .await
            .unwrap();
        (answer.status, answer.headers.get("location").cloned())
    };
    let own = format!("origin: http://127.0.0.1:{port}\nsec-fetch-site: same-origin");
    let added = submit(own.clone(), "%3Cb%3E+it%27s+new").await;
    assert_eq!(added, (303, Some("/".to_owned())));
    let page = get(site.address, "/").await;
    assert!(
        page.body.contains("&#60;b&#62; it&#39;s new"),
        "{}",
        page.body
    );
    assert!(
        page.header("content-security-policy")
            .unwrap()
            .contains("form-action 'self'")
    );
    // Otherwise browsers send the form with the origin `null`, which is refused.
    assert_eq!(page.header("referrer-policy"), Some("same-origin"));

    for foreign in [
        "origin: http://evil.example".to_owned(),
        "origin: null".to_owned(),
        format!("origin: http://127.0.0.1:{}", port ^ 1),
        "sec-fetch-site: cross-site\nsec-fetch-mode: navigate\nsec-fetch-dest: document".to_owned(),
        "sec-fetch-site: same-site".to_owned(),
    ] {
        assert_eq!(submit(foreign.clone(), "foreign").await.0, 403, "{foreign}");
    }
    assert_eq!(
        submit(
            "host: evil.example\norigin: http://evil.example".to_owned(),
            "x"
        )
        .await
        .0,
        421
    );
    for wrong in ["", "+++", "%00", &"x".repeat(2001)] {
        assert_eq!(submit(own.clone(), wrong).await.0, 422, "{wrong}");
    }
    let count: i64 = admin
        .query_one("select count(*) from notes", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(count, 1);
}

#[tokio::test]
async fn other_machines_can_only_read() {
    let (upstream, _gone, _tasks) = scripted(Some(("57P03", "asleep"))).await;
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(notes::serve(
        listener,
        NotesOptions::new(upstream),
        stop.clone(),
    ));
    let head = "POST /\ncontent-type: application/x-www-form-urlencoded";
    let answer = http(port, head, "content=x").await.unwrap();
    assert_eq!(answer.status, 403);
    stop.cancel();
}

#[tokio::test]
async fn other_pages_are_plain_and_other_origins_get_nothing() {
    let (address, _gone, _tasks) = scripted(Some(("57P03", "asleep"))).await;
    let site = site(NotesOptions::new(address)).await;
    let missing = get(site.address, "/../etc/passwd").await;
    assert_eq!(missing.status, 404);
    assert!(missing.body.contains("Nothing here"));
    let own = site.address.to_string();
    let put = request(site.address, "PUT", "/", &[("Host", &own)]).await;
    assert_eq!(put.status, 405);
    let style = get(site.address, "/style.css").await;
    assert_eq!(
        (style.status, style.header("content-type")),
        (200, Some("text/css; charset=utf-8"))
    );
    let icon = get(site.address, "/icon.svg").await;
    assert_eq!(
        (icon.status, icon.header("content-type")),
        (200, Some("image/svg+xml"))
    );

    for headers in [
        &[("Host", "rebound.example")][..],
        &[("Host", own.as_str()), ("Origin", "http://localhost:3000")],
    ] {
        for path in ["/", "/healthz", "/style.css", "/nowhere"] {
            let answer = request(site.address, "GET", path, headers).await;
            assert!(
                matches!(answer.status, 403 | 421),
                "{headers:?} {path}: {}",
                answer.status
            );
            assert!(!answer.body.contains("<html"), "{headers:?} {path}");
        }
    }
}
