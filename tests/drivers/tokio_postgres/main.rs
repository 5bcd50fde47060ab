//! tokio-postgres: one broad job over one server, reported as `key = value` lines.
//!
//! The server is named by libpq's own variables alone, so the same program runs direct and through the proxy.

#![expect(
    clippy::print_stdout,
    reason = "the transcript is this program's whole output"
)]

mod tls;

use std::{
    env,
    error::Error,
    fmt::{Debug, Display},
    future::poll_fn,
    pin::pin,
    time::Duration,
};

use anyhow::{Context, bail};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, TryStreamExt, future::try_join_all};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_postgres::{
    AsyncMessage, Client, Config, IsolationLevel, SimpleQueryMessage, config::SslMode,
    error::DbError, types::Type,
};

use crate::tls::Tls;

/// How long anything here may take before it counts as hung.
const WAIT: Duration = Duration::from_secs(20);

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut server = Server::from_environment()?;
    startup(&mut server).await?;
    let (client, mut messages) = server.connect().await?;
    types(&client).await?;
    large(&client).await?;
    prepared(&client).await?;
    errors(&client).await?;
    transactions(&mut server).await?;
    copy(&client).await?;
    notices(&client, &mut messages).await?;
    results(&client).await?;
    drop(client);
    cancel(&mut server).await?;
    notifications(&mut server).await?;
    ended(&mut server).await?;
    report("end", "of the job");
    Ok(())
}

fn report(key: impl Display, value: impl Display) {
    println!("{key} = {value}");
}

fn report_debug(key: impl Display, value: impl Debug) {
    report(key, format_args!("{value:?}"));
}

fn failure(key: &str, error: &tokio_postgres::Error) {
    let Some(error) = error.as_db_error() else {
        return report(
            key,
            format_args!("no word of the server's: {}", chain(error)),
        );
    };
    report(format_args!("{key}.sqlstate"), error.code().code());
    report(format_args!("{key}.severity"), error.severity());
    report(format_args!("{key}.message"), error.message());
    for (field, value) in [
        ("detail", error.detail()),
        ("hint", error.hint()),
        ("where", error.where_()),
        ("table", error.table()),
        ("column", error.column()),
        ("constraint", error.constraint()),
        ("routine", error.routine()),
    ] {
        if let Some(value) = value {
            report(format_args!("{key}.{field}"), value);
        }
    }
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// Where to connect to; the tasks that drive connections live as long as this.
struct Server {
    config: Config,
    tls: Tls,
    connections: JoinSet<()>,
}

impl Server {
    fn from_environment() -> anyhow::Result<Self> {
        let or =
            |name: &str, otherwise: &str| env::var(name).unwrap_or_else(|_| otherwise.to_owned());
        let mut config = Config::new();
        let user = or("PGUSER", "anyone");
        config
            .host(or("PGHOST", "localhost"))
            .port(or("PGPORT", "5432").parse().context("PGPORT")?)
            .dbname(or("PGDATABASE", &user))
            .user(user)
            .connect_timeout(WAIT)
            .application_name("tokio's job");
        if let Ok(password) = env::var("PGPASSWORD") {
            config.password(password);
        }
        // Not `prefer`, the driver's default: it verifies the certificate, which the proxy has signed itself.
        let mode = or("PGSSLMODE", "disable");
        config.ssl_mode(if mode == "disable" {
            SslMode::Disable
        } else {
            SslMode::Require
        });
        Ok(Self {
            config,
            tls: Tls::new(env::var_os("PGSSLROOTCERT").map(Into::into))?,
            connections: JoinSet::new(),
        })
    }

    async fn connect(
        &mut self,
    ) -> Result<(Client, mpsc::UnboundedReceiver<AsyncMessage>), tokio_postgres::Error> {
        self.connect_with(|_| {}).await
    }

    async fn connect_with(
        &mut self,
        change: impl FnOnce(&mut Config),
    ) -> Result<(Client, mpsc::UnboundedReceiver<AsyncMessage>), tokio_postgres::Error> {
        let mut config = self.config.clone();
        change(&mut config);
        let (client, mut connection) = config.connect(self.tls.clone()).await?;
        let (sender, messages) = mpsc::unbounded_channel();
        self.connections.spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await
            {
                // A receiver that has gone has received enough; the connection is driven all the same.
                let _ = sender.send(message);
            }
        });
        Ok((client, messages))
    }

    /// The process that is seen asleep in `pg_sleep`: a pool may run each transaction at another one.
    async fn asleep(&mut self) -> anyhow::Result<i32> {
        let (watcher, _messages) = self.connect().await?;
        let end = Instant::now() + WAIT;
        while Instant::now() < end {
            let row = watcher
                .query_opt("select pid from pg_stat_activity where state = 'active' and wait_event = 'PgSleep'", &[])
                .await?;
            if let Some(row) = row {
                return Ok(row.get(0));
            }
            sleep(Duration::from_millis(20)).await;
        }
        bail!("no backend began to sleep")
    }
}

async fn startup(server: &mut Server) -> anyhow::Result<()> {
    let options = |config: &mut Config| {
        config.options("-c search_path=public,pg_catalog -c geqo=off -c statement_timeout=54321");
    };
    let (client, _messages) = server.connect_with(options).await?;
    let show = async |key: &str| -> anyhow::Result<()> {
        for name in [
            "application_name",
            "search_path",
            "geqo",
            "statement_timeout",
            "client_encoding",
            "TimeZone",
            "DateStyle",
        ] {
            let row = client.query_one(&format!("show {name}"), &[]).await?;
            report(format_args!("{key}.{name}"), row.get::<_, &str>(0));
        }
        Ok(())
    };
    show("startup.show").await?;
    client
        .batch_execute("set application_name = 'changed'; set geqo = on; reset all")
        .await?;
    show("startup.after RESET ALL").await?;
    client
        .batch_execute("set search_path = pg_catalog; set statement_timeout = 1000")
        .await?;
    client.batch_execute("discard all").await?;
    show("startup.after DISCARD ALL").await?;
    let row = client
        .query_one(
            "select current_database()::text, current_user::text, version()",
            &[],
        )
        .await?;
    report_debug(
        "startup.current",
        (
            row.get::<_, &str>(0),
            row.get::<_, &str>(1),
            row.get::<_, &str>(2),
        ),
    );
    let refused = [
        (
            "startup.no such database",
            server
                .connect_with(|config| {
                    config.dbname("no_such_database");
                })
                .await
                .err(),
        ),
        (
            "startup.bad option",
            server
                .connect_with(|config| {
                    config.options("-c no_such_setting=1");
                })
                .await
                .err(),
        ),
    ];
    for (key, error) in refused {
        report_debug(
            key,
            error.and_then(|error| error.code().map(|code| code.code().to_owned())),
        );
    }
    Ok(())
}

async fn types(client: &Client) -> anyhow::Result<()> {
    let row = client
        .query_one(
            "select 42::int2, -7::int4, 9007199254740993::int8, 1.5::float4, 2.25::float8, true, 'naïve – 漢字 🐘'::text, '\\xdeadbeef'::bytea,
                    array[1, null, 3]::int4[], null::text, date '2026-02-28', timestamp '2026-02-28 12:34:56.789', timestamptz '2026-02-28 12:34:56+00', 'infinity'::float8",
            &[],
        )
        .await?;
    report_debug(
        "types.numbers",
        (
            row.get::<_, i16>(0),
            row.get::<_, i32>(1),
            row.get::<_, i64>(2),
            row.get::<_, f32>(3),
            row.get::<_, f64>(4),
        ),
    );
    report_debug(
        "types.texts",
        (
            row.get::<_, bool>(5),
            row.get::<_, &str>(6),
            row.get::<_, &[u8]>(7),
            row.get::<_, Vec<Option<i32>>>(8),
        ),
    );
    report_debug("types.null", row.get::<_, Option<&str>>(9));
    report_debug(
        "types.times",
        (
            row.get::<_, jiff::civil::Date>(10),
            row.get::<_, jiff::civil::DateTime>(11),
            row.get::<_, jiff::Timestamp>(12),
            row.get::<_, f64>(13),
        ),
    );
    let names: Vec<&str> = row
        .columns()
        .iter()
        .map(|column| column.type_().name())
        .collect();
    report_debug("types.names", names);
    client
        .batch_execute("create type pg_temp.mood as enum ('sad', 'happy 🐘')")
        .await?;
    let statement = client
        .prepare("select $1::pg_temp.mood, $2::int4[], $3::bytea, $4::text")
        .await?;
    report_debug(
        "types.looked up",
        statement
            .params()
            .iter()
            .map(Type::name)
            .collect::<Vec<_>>(),
    );
    let columns: Vec<String> = (0..1600).map(|n| n.to_string()).collect();
    let wide = client
        .query_one(&format!("select {}", columns.join(",")), &[])
        .await?;
    report("types.1600 columns", wide.len());
    report_debug("types.empty query", client.simple_query("").await?.len());
    Ok(())
}

async fn large(client: &Client) -> anyhow::Result<()> {
    let text = "0123456789abcdef".repeat(1 << 20);
    let row = client
        .query_one(
            "select md5($1::text), repeat('0123456789abcdef', 1 << 20)",
            &[&text],
        )
        .await?;
    report_debug(
        "large",
        (row.get::<_, &str>(0), row.get::<_, &str>(1) == text),
    );
    let mut rows = pin!(
        client
            .query_raw(
                "select g, md5(g::text) from generate_series(1, 100000) g",
                std::iter::empty::<i32>()
            )
            .await?
    );
    let (mut count, mut last) = (0, String::new());
    while let Some(row) = rows.try_next().await? {
        count += 1;
        last = row.get(1);
    }
    report_debug("large.rows", (count, last));
    Ok(())
}

async fn prepared(client: &Client) -> anyhow::Result<()> {
    let doubled = client.prepare("select $1::int4 * 2").await?;
    for n in 0..3 {
        report(
            format_args!("prepared.{n}"),
            client.query_one(&doubled, &[&n]).await?.get::<_, i32>(0),
        );
    }
    // The driver pipelines concurrent queries.
    let sums =
        try_join_all((0..300).map(async |n: i32| client.query_one(&doubled, &[&n]).await)).await?;
    report(
        "prepared.pipelined",
        sums.iter().map(|row| row.get::<_, i32>(0)).sum::<i32>(),
    );
    let mixed = futures_util::future::join3(
        client.query_one("select 1", &[]),
        client.query_one("select 1 / 0", &[]),
        client.query_one("select 2", &[]),
    )
    .await;
    report_debug(
        "prepared.mixed",
        (
            mixed.0.is_ok(),
            mixed.1.err().and_then(|error| error.code().cloned()),
            mixed.2.is_ok(),
        ),
    );
    let known = client
        .query_one(
            "select count(*) from pg_prepared_statements where statement = 'select $1::int4 * 2'",
            &[],
        )
        .await?;
    report("prepared.known to the server", known.get::<_, i64>(0));
    drop((doubled, sums)); // rows, too, hold on to their statement
    // A dropped statement is closed behind the scenes, ahead of the next query.
    let known = client
        .query_one(
            "select count(*) from pg_prepared_statements where statement = 'select $1::int4 * 2'",
            &[],
        )
        .await?;
    report("prepared.closed", known.get::<_, i64>(0));
    Ok(())
}

async fn errors(client: &Client) -> anyhow::Result<()> {
    client
        .batch_execute("create temp table strict (id int primary key, positive int constraint must_be_positive check (positive > 0), label text not null)")
        .await?;
    for (key, sql) in [
        (
            "errors.unique",
            "insert into strict values (1, 1, 'a'), (1, 2, 'b')",
        ),
        ("errors.check", "insert into strict values (2, -1, 'a')"),
        ("errors.not null", "insert into strict values (3, 1, null)"),
        ("errors.syntax", "selec 1"),
        ("errors.no table", "select * from no_such_table"),
        (
            "errors.raised",
            "do $$ begin raise exception 'own words %', 7 using errcode = 'LB001', detail = 'a detail', hint = 'a hint'; end $$",
        ),
        (
            "errors.unicode",
            "do $$ begin raise exception 'żółć 🐘'; end $$",
        ),
    ] {
        match client.execute(sql, &[]).await {
            Ok(count) => report(key, count),
            Err(error) => failure(key, &error),
        }
        if let Err(error) = client.batch_execute(sql).await {
            report_debug(
                format_args!("{key}.simple"),
                error.as_db_error().map(DbError::code),
            );
        }
    }
    Ok(())
}

async fn transactions(server: &mut Server) -> anyhow::Result<()> {
    let (mut client, _messages) = server.connect().await?;
    client
        .batch_execute("create temp table kept (n int)")
        .await?;
    let mut transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::Serializable)
        .start()
        .await?;
    transaction
        .execute("insert into kept values (1)", &[])
        .await?;
    let inner = transaction.savepoint("inner_point").await?;
    inner.execute("insert into kept values (2)", &[]).await?;
    report_debug(
        "transactions.inside",
        inner
            .query_one("select 1 / 0", &[])
            .await
            .err()
            .and_then(|error| error.code().cloned()),
    );
    report_debug(
        "transactions.failed",
        inner
            .query_one("select 1", &[])
            .await
            .err()
            .and_then(|error| error.code().cloned()),
    );
    inner.rollback().await?;
    transaction.commit().await?;
    let transaction = client.transaction().await?;
    let portal = transaction
        .bind("select generate_series(1, 10)", &[])
        .await?;
    report(
        "transactions.portal",
        transaction.query_portal(&portal, 3).await?.len(),
    );
    report(
        "transactions.rest",
        transaction.query_portal(&portal, 0).await?.len(),
    );
    drop(transaction); // rolls back
    report(
        "transactions.kept",
        client
            .query_one("select sum(n) from kept", &[])
            .await?
            .get::<_, i64>(0),
    );
    Ok(())
}

async fn copy(client: &Client) -> anyhow::Result<()> {
    client
        .batch_execute("create temp table copied (id int, t text)")
        .await?;
    let mut sink = pin!(client.copy_in("copy copied from stdin").await?);
    for n in 0..20_000 {
        sink.feed(Bytes::from(format!("{n}\trow {n} żółć 🐘\n")))
            .await?;
    }
    report("copy.in", sink.as_mut().finish().await?);
    let mut stream = pin!(
        client
            .copy_out("copy (select * from copied order by id) to stdout")
            .await?
    );
    let mut bytes = 0;
    while let Some(block) = stream.try_next().await? {
        bytes += block.len();
    }
    report("copy.out", bytes);
    let mut sink = pin!(client.copy_in("copy copied from stdin").await?);
    sink.send(Bytes::from_static(b"not a number\tx\n")).await?;
    if let Err(error) = sink.as_mut().finish().await {
        failure("copy.bad row", &error);
    }
    {
        let mut sink = pin!(client.copy_in::<_, Bytes>("copy copied from stdin").await?);
        sink.send(Bytes::from_static(b"1\tx\n")).await?;
        // Dropped unfinished: the driver sends CopyFail.
    }
    let mut stream = pin!(
        client
            .copy_out("copy (select 1 / (50000 - g) from generate_series(1, 60000) g) to stdout")
            .await?
    );
    // The driver repeats its error at each call, so the first one ends the loop.
    let failed = loop {
        match stream.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break Some(error),
            None => break None,
        }
    };
    report_debug(
        "copy.out fails midway",
        failed.and_then(|error| error.code().cloned()),
    );
    report(
        "copy.left",
        client
            .query_one("select count(*) from copied", &[])
            .await?
            .get::<_, i64>(0),
    );
    Ok(())
}

async fn notices(
    client: &Client,
    messages: &mut mpsc::UnboundedReceiver<AsyncMessage>,
) -> anyhow::Result<()> {
    client
        .batch_execute("do $$ begin raise notice 'first'; raise warning 'second' using hint = 'h'; raise notice '%', repeat('x', 70000); end $$")
        .await?;
    for _ in 0..3 {
        if let Some(AsyncMessage::Notice(notice)) = timeout(WAIT, messages.recv()).await? {
            report_debug(
                "notices",
                (
                    notice.severity(),
                    notice.code().code(),
                    notice.message().len(),
                    notice.hint(),
                ),
            );
        }
    }
    Ok(())
}

async fn results(client: &Client) -> anyhow::Result<()> {
    let messages = client
        .simple_query("select 1 as a; select 'two', null; create temp table third (n int); insert into third select generate_series(1, 5); select count(*) from third")
        .await?;
    for message in messages {
        match message {
            SimpleQueryMessage::Row(row) => report_debug(
                "results.row",
                (0..row.len()).map(|n| row.get(n)).collect::<Vec<_>>(),
            ),
            SimpleQueryMessage::CommandComplete(count) => report("results.complete", count),
            SimpleQueryMessage::RowDescription(columns) => report("results.columns", columns.len()),
            _ => report("results", "something else"),
        }
    }
    let error = client
        .batch_execute("insert into third values (6); select 1 / 0; select 3")
        .await
        .err();
    report_debug(
        "results.error",
        error.and_then(|error| error.code().cloned()),
    );
    report(
        "results.undone",
        client
            .query_one("select count(*) from third", &[])
            .await?
            .get::<_, i64>(0),
    );
    Ok(())
}

async fn cancel(server: &mut Server) -> anyhow::Result<()> {
    let (client, _messages) = server.connect().await?;
    let began = Instant::now();
    let token = client.cancel_token();
    let tls = server.tls.clone();
    let strike = async {
        server.asleep().await?;
        // This driver hangs up as soon as the request is written.
        token.cancel_query(tls).await.context("the cancel request")
    };
    let (answer, struck) = tokio::join!(client.batch_execute("select pg_sleep(60)"), strike);
    struck?;
    if let Err(error) = answer {
        failure("cancel", &error);
    }
    report("cancel.prompt", began.elapsed() < WAIT);
    report(
        "cancel.usable",
        client.query_one("select 1", &[]).await?.get::<_, i32>(0),
    );
    Ok(())
}

async fn notifications(server: &mut Server) -> anyhow::Result<()> {
    let (listener, mut messages) = server.connect().await?;
    let (speaker, _messages) = server.connect().await?;
    let pid: i32 = speaker
        .query_one("select pg_backend_pid()", &[])
        .await?
        .get(0);
    listener.batch_execute("listen drivers_tokio").await?;
    speaker
        .batch_execute("notify drivers_tokio, 'one'; notify drivers_tokio, 'two 🐘'")
        .await?;
    for _ in 0..2 {
        if let Some(AsyncMessage::Notification(received)) = timeout(WAIT, messages.recv()).await? {
            report_debug(
                "notify",
                (
                    received.channel(),
                    received.payload(),
                    received.process_id() == pid,
                ),
            );
        }
    }
    Ok(())
}

/// The client receives the server's own error when its backend is terminated.
async fn ended(server: &mut Server) -> anyhow::Result<()> {
    let (victim, _messages) = server.connect().await?;
    let (killer, _more) = server.connect().await?;
    let strike = async {
        let pid = server.asleep().await?;
        killer
            .query_one("select pg_terminate_backend($1)", &[&pid])
            .await
            .context("the end of the victim")
    };
    let (answer, struck) = tokio::join!(victim.batch_execute("select pg_sleep(60)"), strike);
    struck?;
    if let Err(error) = answer {
        failure("ended", &error);
    }
    Ok(())
}
