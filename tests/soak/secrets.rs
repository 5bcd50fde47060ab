//! Memory holds the current credential once and no replaced one: a core dump or a swapped page must not reveal them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use serde::Deserialize;

use crate::{
    Stage,
    measure::{eventually, metric},
    wire::Wire,
};

/// Short enough that a credential is replaced every few seconds.
const LIFETIME: Duration = Duration::from_secs(12);
const REFRESHES: f64 = 5.0;
/// At once, so that the allocator has copies in more than one thread's cache.
const LOGINS: usize = 20;

/// The claims that distinguish the emulator's tokens.
#[derive(Deserialize)]
struct Claims {
    aud: String,
    iat: i64,
}

pub(crate) async fn in_memory(stage: &Stage, program: &Path) {
    stage
        .emulator
        .configure(|settings| settings.token_ttl = LIFETIME);
    // The first credential lasts an hour; a login with it leads to the first short-lived one.
    stage.emulator.revoke_credentials();
    eventually(Duration::from_mins(2), async || {
        let logins = (0..LOGINS).map(|_| Wire::connect(stage.postgres));
        for client in join_all(logins).await {
            client.unwrap().terminate().await.unwrap();
        }
        let refreshes = metric(stage.http, "credential_refreshes_total").await;
        (refreshes < REFRESHES).then(|| format!("{refreshes} credentials"))
    })
    .await;

    let memory = writable_memory(stage.proxy.id());
    let mut copies: BTreeMap<String, BTreeMap<(i64, Vec<u8>), usize>> = BTreeMap::new();
    for token in memory.iter().flat_map(|region| tokens(region)) {
        if let Some(Claims { aud, iat }) = claims(token) {
            let of_kind = copies.entry(aud).or_default();
            *of_kind.entry((iat, token.to_vec())).or_default() += 1;
        }
    }
    for (kind, tokens) in &copies {
        let counts: Vec<usize> = tokens.values().copied().collect();
        println!("   copies of {kind} tokens, from oldest to newest: {counts:?}");
    }
    let credentials = copies.get("lakebase").expect("the current credential");
    if wipes_freed_memory(program) {
        assert_eq!(
            credentials.values().collect::<Vec<_>>(),
            [&1],
            "besides the current credential in its cell, there are copies or replaced ones"
        );
    } else {
        println!("   this build's allocator does not wipe freed memory: reported only");
    }
}

/// Whether the build has jemalloc with the option that overwrites what is freed (`.cargo/config.toml`).
fn wipes_freed_memory(program: &Path) -> bool {
    let file = fs::read(program).unwrap();
    file.windows(9).any(|window| window == b"junk:free")
}

fn writable_memory(process: u32) -> Vec<Vec<u8>> {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let memory = File::open(format!("/proc/{process}/mem")).unwrap();
    let regions = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let [start, end] = [start, end].map(|it| u64::from_str_radix(it, 16).ok());
        rest.starts_with("rw").then_some((start?, end?))
    });
    regions
        .filter_map(|(start, end)| {
            let mut region = vec![0; usize::try_from(end - start).ok()?];
            // Guard pages and mappings that ended meanwhile cannot be read.
            memory.read_exact_at(&mut region, start).ok()?;
            Some(region)
        })
        .collect()
}

/// The JSON Web Tokens in `memory`: `eyJ` is `{"` in base64.
fn tokens(memory: &[u8]) -> impl Iterator<Item = &[u8]> {
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    let words = memory.split(move |byte| !is_part(byte));
    words.filter_map(|word| {
        let start = word.windows(3).position(|window| window == b"eyJ")?;
        let token = word.get(start..)?;
        (token.split(|byte| *byte == b'.').count() == 3).then_some(token)
    })
}

fn claims(token: &[u8]) -> Option<Claims> {
    let payload = token.split(|byte| *byte == b'.').nth(1)?;
    let json = BASE64_URL_SAFE_NO_PAD.decode(payload).ok()?;
    serde_json::from_slice(&json).ok()
}
