//! What an emulator makes is gone when it goes, however it goes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use lakebase_proxy::emulator::{
    Emulator, EmulatorError, EmulatorOptions, EnvironmentFormat, LocalPostgres,
    LocalPostgresOptions, PostgresSource,
};

use crate::harness::{
    another_server,
    binary::PROGRAM,
    emulator::{TIMEOUT, connect, start},
    eventually, own_server,
};

fn processes_in(directory: &Path) -> Vec<PathBuf> {
    let directory = directory.to_str().unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            fs::read(path.join("cmdline"))
                .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(directory))
        })
        .collect()
}

#[tokio::test]
async fn nothing_is_left_after_a_stop() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let directory = emulator.ca_file().parent().unwrap().to_owned();
    assert_eq!(
        fs::metadata(directory.join("s"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    assert_eq!(
        fs::metadata(directory.join("data"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    assert!(!processes_in(&directory).is_empty());
    let client = connect(&emulator).await.unwrap();
    emulator.stop().await;
    assert!(!directory.exists());
    assert_eq!(processes_in(&directory), Vec::<PathBuf>::new());
    assert!(client.simple_query("select 1").await.is_err());
}

#[tokio::test]
async fn postgres_restarts_with_its_data() {
    let (server, emulator) = own_server().await;
    for round in 0..2 {
        let client = connect(&emulator).await.unwrap();
        let insert = format!("insert into notes (content) values ('round {round}')");
        client.batch_execute(&insert).await.unwrap();
        let (ended, restarted) = tokio::join!(
            client.batch_execute("select pg_sleep(60)"),
            server.restart()
        );
        restarted.unwrap();
        assert!(ended.is_err());
    }
    let client = connect(&emulator).await.unwrap();
    let query = "select count(*) from notes where content like 'round %'";
    let rows: i64 = client.query_one(query, &[]).await.unwrap().get(0);
    assert_eq!(rows, 2);
    let directory = server.directory().to_owned();
    emulator.stop().await;
    drop(server);
    assert!(!directory.exists());
    assert_eq!(processes_in(&directory), Vec::<PathBuf>::new());
}

#[test]
fn nothing_is_left_after_a_panic() {
    let (send, receive) = std::sync::mpsc::channel();
    let test = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
            send.send(emulator.ca_file().parent().unwrap().to_owned())
                .unwrap();
            panic!("as a failing test does");
        });
    });
    let directory = receive.recv().unwrap();
    assert!(test.join().is_err());
    assert!(!directory.exists());
    assert_eq!(processes_in(&directory), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn postgres_outlives_no_parent_not_even_a_killed_one() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("env");
    let mut program = Command::new(PROGRAM)
        .args(["emulator", "--env-file"])
        .arg(&file)
        .spawn()
        .unwrap();
    eventually("the file appears", async || file.exists().then_some(())).await;
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let text = fs::read_to_string(&file).unwrap();
    let names: Vec<&str> = text
        .lines()
        .map(|line| line.split_once('=').unwrap().0)
        .collect();
    assert_eq!(
        names,
        [
            "DATABRICKS_HOST",
            "DATABRICKS_CLIENT_ID",
            "DATABRICKS_CLIENT_SECRET",
            "ENDPOINT_NAME",
            "PGHOST",
            "PGPORT",
            "PGDATABASE",
            "PGUSER",
            "PGSSLMODE",
            "PGSSLROOTCERT"
        ]
    );
    let authority = text
        .lines()
        .find_map(|line| line.strip_prefix("PGSSLROOTCERT="))
        .unwrap();
    let directory = Path::new(authority).parent().unwrap().to_owned();
    program.kill().unwrap();
    program.wait().unwrap();
    eventually("everything goes", async || {
        (!directory.exists() && processes_in(&directory).is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_variables_are_sourced_as_they_stand() {
    let emulator = start().await;
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("env");
    emulator
        .write_env_file(&file, EnvironmentFormat::Shell)
        .unwrap();
    let output = Command::new("/bin/sh")
        .args(["-c", ". \"$0\" && exec env"])
        .arg(&file)
        .output()
        .unwrap();
    let seen = String::from_utf8(output.stdout).unwrap();
    for (name, value) in emulator.environment() {
        let line = format!("{name}={value}");
        assert!(seen.lines().any(|seen| seen == line), "{name}: {seen}");
    }
}

#[tokio::test]
async fn a_postgres_named_by_url_is_used_and_left_as_it_was() {
    let server = another_server().await;
    let url = format!(
        "host={} user=databricks_control_plane dbname=postgres",
        server.directory().join("s").display()
    );
    let options = EmulatorOptions {
        postgres: PostgresSource::Url(url.clone().into()),
        ..EmulatorOptions::default()
    };
    let emulator = Emulator::start(options).await.unwrap();
    let app = emulator.identities().app.name.clone();
    let client = connect(&emulator).await.unwrap();
    client
        .simple_query("select content from notes; create table mine ()")
        .await
        .unwrap();
    drop(client);
    emulator.stop().await;

    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio_util::task::TaskTracker::new().spawn(async move {
        let _ = connection.await;
    });
    let left = client
        .query_one("select count(*) from pg_roles where rolname = $1", &[&app])
        .await
        .unwrap();
    assert_eq!(left.get::<_, i64>(0), 0);
}

#[tokio::test]
async fn a_missing_postgres_is_reported_with_the_package_to_install() {
    let empty = tempfile::tempdir().unwrap();
    let options = LocalPostgresOptions {
        bin_dir: Some(empty.path().to_owned()),
        ..LocalPostgresOptions::default()
    };
    let error = LocalPostgres::start(options).await.unwrap_err();
    assert!(matches!(error, EmulatorError::NoPostgresIn { .. }));
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let emulator = start().await;
    let options = EmulatorOptions {
        pg_port: emulator.pg_port(),
        ..EmulatorOptions::default()
    };
    let error = Emulator::start(options).await.unwrap_err();
    assert!(error.to_string().contains(&emulator.pg_port().to_string()));
}

#[tokio::test]
async fn two_emulators_on_one_postgres_do_not_conflict() {
    let (one, two) = (start().await, start().await);
    let (first, second) = (connect(&one).await.unwrap(), connect(&two).await.unwrap());
    one.suspend().await;
    one.wait_for(TIMEOUT, |counts| counts.sessions == 0)
        .await
        .unwrap();
    assert!(first.simple_query("select 1").await.is_err());
    second.simple_query("select 1").await.unwrap();
}

#[tokio::test]
async fn it_answers_on_both_loopback_addresses() {
    let emulator = start().await;
    let has_v6 = tokio::net::TcpListener::bind("[::1]:0").await.is_ok();
    for address in ["127.0.0.1", "::1"] {
        let dialed = tokio::net::TcpStream::connect((address, emulator.pg_port())).await;
        assert!(dialed.is_ok() || (address == "::1" && !has_v6), "{address}");
    }
}
