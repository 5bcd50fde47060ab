//! The proxy as a process of its own, in front of a scripted server.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use super::upstream::Upstream;

/// A running proxy; killed when dropped.
pub(crate) struct Proxy {
    child: Child,
    /// Where clients connect.
    pub(crate) address: SocketAddr,
}

impl Proxy {
    /// Starts `program` behind `prefix` (as valgrind is), leading to `upstream`.
    pub(crate) fn start(program: &Path, prefix: &[&str], upstream: &Upstream) -> Self {
        let configuration = upstream.authority.with_file_name("proxy.toml");
        let endpoint = format!(
            "[[endpoint]]\nhost = \"localhost\"\nport = {}\nuser = \"app\"\ndatabase = \"d\"\n\
             credential = {{ password_env = \"MEASURE_PASSWORD\" }}\nlisten = 0\n",
            upstream.port
        );
        std::fs::write(&configuration, endpoint).expect("the directory can be written");
        let program = program.display().to_string();
        let words = [prefix, &[&program]].concat();
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .args([
                "--http-port",
                "none",
                "--max-connections",
                "9000",
                "--config-file",
            ])
            .arg(&configuration)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("MEASURE_PASSWORD", "x".repeat(1100))
            .env("PGSSLROOTCERT", &upstream.authority)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", words[0]));
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let mut output = String::new();
        let address = loop {
            let Some(Ok(line)) = lines.next() else {
                let _ = child.kill();
                panic!("the proxy did not start:\n{output}");
            };
            if line.contains("listening for Postgres clients") {
                let (_, rest) = line.split_once("127.0.0.1:").expect("an address");
                let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
                break SocketAddr::from(([127, 0, 0, 1], port.parse().expect("a port")));
            }
            output.push_str(&line);
            output.push('\n');
        };
        // Later output must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
