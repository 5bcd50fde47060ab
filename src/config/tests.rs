//! Tests of resolving layers of settings.

use super::*;

const NAME: &str = "projects/p/branches/b/endpoints/e";

fn environment(variables: &[(&str, &str)]) -> Environment {
    Environment::from_variables(variables.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())))
}

fn resolve(variables: &[(&str, &str)], file: &str) -> Result<Config, ConfigError> {
    let mut all = vec![("ENDPOINT_NAME", NAME)];
    all.extend(variables);
    Config::resolve(toml::from_str(file).unwrap(), environment(&all))
}

#[test]
fn the_variables_of_the_tutorial_configure_an_endpoint() {
    let config = resolve(
        &[
            ("PGHOST", "ep-x.database.us-east-1.cloud.databricks.com"),
            ("PGDATABASE", "databricks_postgres"),
            ("PGUSER", "0f7d6fce-0000-4000-8000-000000000000"),
            ("PGPORT", "5432"),
            ("PGSSLMODE", "require"),
        ],
        "",
    )
    .unwrap();
    let [endpoint] = &config.endpoints[..] else {
        panic!("one endpoint")
    };
    assert_eq!(endpoint.listen.to_string(), "127.0.0.1:5432");
    assert_eq!(config.http, Some("127.0.0.1:9090".parse().unwrap()));
    assert_eq!(config.notes, None);
    assert_eq!(
        config.endpoints[0].tls,
        TlsMode::Verified(Roots::System),
        "`require` still verifies the certificate"
    );
    assert_eq!(config.settings.max_connections(), 0);
}

#[test]
fn flags_override_the_file() {
    let file = "port = 6000\nhttp_port = \"none\"\nconnect_timeout = \"1m 30s\"\nnotes = true\nmax_connections = 7";
    let config = resolve(&[("DATABRICKS_APP_PORT", "8080")], file).unwrap();
    assert_eq!(config.endpoints[0].listen.port, 6000);
    assert_eq!(config.http, None);
    assert_eq!(
        config.settings.connect_timeout(),
        DurationSetting::from_secs(90)
    );
    assert_eq!(config.notes, Some("0.0.0.0:8080".parse().unwrap()));
    assert_eq!(config.settings.max_connections(), 7);
    let flag = Settings {
        port: Some(PortSetting::Port(1)),
        ..Settings::default()
    };
    assert_eq!(
        flag.or(toml::from_str(file).unwrap()).port,
        Some(PortSetting::Port(1))
    );
}

#[test]
fn blank_variables_count_as_unset() {
    let config = resolve(
        &[
            ("PGHOST", " "),
            ("PGPORT", ""),
            ("PGSSLROOTCERT", "system "),
        ],
        "",
    )
    .unwrap();
    assert_eq!(config.endpoints[0].host, None);
    assert_eq!(config.endpoints[0].port, 5432);
    assert_eq!(config.endpoints[0].tls, TlsMode::Verified(Roots::System));
}

#[test]
fn invalid_combinations_are_refused_with_a_hint() {
    for (variables, file, expected) in [
        (
            &[("LAKEBASE_ENDPOINT", "projects/p/branches/b/endpoints/other")][..],
            "",
            "but LAKEBASE_ENDPOINT is `projects/p/branches/b/endpoints/other`",
        ),
        (
            &[],
            "address = \"0.0.0.0\"",
            "--address 0.0.0.0 can be reached from other machines",
        ),
        (
            &[("PGHOST", "db.example.com"), ("PGSSLMODE", "disable")],
            "",
            "`db.example.com` is not this machine",
        ),
        (&[("PGSSLMODE", "off")], "", "PGSSLMODE is `off`"),
        (&[("PGPORT", "0")], "", "PGPORT is `0`"),
        (
            &[("PGHOST", "ep-x.us-east-2.aws.Neon.tech")],
            "",
            "is a host of Neon",
        ),
        (
            &[("PGHOSTADDR", "db.example.com")],
            "",
            "PGHOSTADDR is `db.example.com`",
        ),
        (
            &[
                ("PGHOST", "localhost"),
                ("PGHOSTADDR", "127.0.0.1,192.0.2.1"),
                ("PGSSLMODE", "disable"),
            ],
            "",
            "`192.0.2.1` is not this machine",
        ),
        (
            &[],
            "port = \"none\"",
            "--port is `none`, and there is no Unix socket",
        ),
        (
            &[],
            "max_prepared_statements = 0",
            "max_prepared_statements is 0",
        ),
    ] {
        let error = resolve(variables, file).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // Databricks may open the pooler to OAuth roles, so it only causes a warning.
    let pooler = "ep-x-pooler.database.cloud.databricks.com";
    assert!(resolve(&[("PGHOST", pooler)], "").is_ok());
    let none = Config::resolve(Settings::default(), environment(&[])).unwrap_err();
    assert!(
        none.hint()
            .is_some_and(|hint| hint.contains("ENDPOINT_NAME="))
    );
    assert!(resolve(&[("PGHOST", "localhost"), ("PGSSLMODE", "disable")], "").is_ok());
    assert!(resolve(&[], "address = \"0.0.0.0\"\nallow_remote = true").is_ok());
}

#[test]
fn each_further_endpoint_takes_the_next_port() {
    let config = resolve(
        &[("PGHOST", "not.for.tables"), ("SECRET", "s")],
        "[[endpoint]]\nname = \"projects/p/branches/b/endpoints/e\"\n\
         [[endpoint]]\nname = \"projects/p/branches/b/endpoints/e\"\nread_only = true\ndatabase = \"d\"\n\
         [[endpoint]]\nhost = \"pg\"\nuser = \"u\"\nlisten = 7000\ncredential = { password_env = \"SECRET\" }",
    )
    .unwrap();
    let ports: Vec<_> = config
        .endpoints
        .iter()
        .map(|endpoint| endpoint.listen.port)
        .collect();
    assert_eq!(ports, [5432, 5433, 7000]);
    assert_eq!(
        config.endpoints[0].host, None,
        "PGHOST configures an endpoint only if there is no table"
    );
    assert!(config.endpoints[1].read_only);
    assert!(matches!(
        config.endpoints[2].credential,
        CredentialSource::Password(_)
    ));
}

#[test]
fn an_own_credential_needs_a_host_and_a_user() {
    let error =
        |rest: &str| resolve(&[("SECRET", "s")], &format!("[[endpoint]]\n{rest}")).unwrap_err();
    let password = "credential = { password_env = \"SECRET\" }";
    for (table, expected) in [
        (
            format!("name = \"x\"\n{password}"),
            "has a credential but no host",
        ),
        (
            format!("host = \"h\"\n{password}"),
            "has a credential but no user",
        ),
        (
            password.replace("SECRET", "UNSET") + "\nhost = \"h\"\nuser = \"u\"",
            "takes its password from UNSET, which is not set",
        ),
        (
            "host = \"h\"\nuser = \"u\"\ncredential = { command = [] }".to_owned(),
            "has an empty credential command",
        ),
        ("user = \"u\"".to_owned(), "no endpoint is named"),
    ] {
        let error = error(&table).to_string();
        assert!(error.contains(expected), "{table}: {error}");
    }
}

#[test]
fn an_unknown_key_is_refused() {
    assert!(toml::from_str::<Settings>("prot = 1").is_err());
}
