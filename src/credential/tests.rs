//! The cell and the refresher together, in paused time, against a scripted mint.

use std::{
    collections::HashSet,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use secrecy::ExposeSecret;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    clock::Clock,
    telemetry::{Metrics, labels::RefreshOutcome},
};

const HOUR: Duration = Duration::from_hours(1);
const MINUTE: Duration = Duration::from_mins(1);

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A credential of this lifetime.
    Gives(Duration),
    GivesForever,
    /// A credential of this lifetime, after a while.
    GivesAfter(Duration, Duration),
    /// The same credential as ever: it expires this long after the start.
    GivesUntil(Duration),
    Fails(CallErrorKind),
    RequestsWait(Duration),
    Hangs,
}

/// What the workspace does at the `n`th call (from 0), that begins this long after the start.
type Script = dyn Fn(usize, Duration) -> Step + Send + Sync;

#[derive(Clone)]
struct Scripted {
    clock: Clock,
    origin: Timestamp,
    started: Instant,
    calls: Arc<Mutex<Vec<Duration>>>,
    script: Arc<Script>,
}

impl Mint for Scripted {
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>> {
        Box::pin(self.step())
    }
}

impl Scripted {
    async fn step(&self) -> Result<Minted, CallError> {
        let elapsed = self.started.elapsed();
        let n = {
            let mut calls = self.calls.lock().unwrap();
            calls.push(elapsed);
            calls.len() - 1
        };
        let fails = |kind, retry_after| CallError {
            retry_after,
            ..CallError::new(kind, format!("scripted failure {n}")).with_hint("fix the script")
        };
        let expires_at = match (self.script)(n, elapsed) {
            Step::Gives(lifetime) => {
                Some(self.clock.now() + SignedDuration::try_from(lifetime).unwrap())
            }
            Step::GivesForever => None,
            Step::GivesAfter(wait, lifetime) => {
                sleep(wait).await;
                Some(self.clock.now() + SignedDuration::try_from(lifetime).unwrap())
            }
            Step::GivesUntil(until) => Some(self.origin + SignedDuration::try_from(until).unwrap()),
            Step::Fails(kind) => return Err(fails(kind, None)),
            Step::RequestsWait(wait) => return Err(fails(CallErrorKind::RateLimited, Some(wait))),
            Step::Hangs => pending().await,
        };
        Ok(Minted {
            secret: format!("secret {n}").into(),
            expires_at,
        })
    }
}

/// A running refresher and everything that a test looks at.
struct Rig {
    cell: CredentialCell,
    clock: Clock,
    mint: Scripted,
    metrics: Arc<Metrics>,
    _tasks: JoinSet<()>,
}

impl Rig {
    fn start(script: impl Fn(usize, Duration) -> Step + Send + Sync + 'static) -> Self {
        Self::with(CredentialCell::new, script)
    }

    fn lazy(script: impl Fn(usize, Duration) -> Step + Send + Sync + 'static) -> Self {
        Self::with(CredentialCell::lazy, script)
    }

    fn with(
        cell: impl Fn(Clock) -> CredentialCell,
        script: impl Fn(usize, Duration) -> Step + Send + Sync + 'static,
    ) -> Self {
        let origin = Timestamp::from_second(1_700_000_000).unwrap();
        let clock = Clock::simulated(origin);
        let mint = Scripted {
            clock: clock.clone(),
            origin,
            started: Instant::now(),
            calls: Arc::default(),
            script: Arc::new(script),
        };
        let cell = cell(clock.clone());
        let metrics = Metrics::new().unwrap();
        let mut tasks = JoinSet::new();
        let refresher = Refresher::new(Arc::new(mint.clone()), cell.clone(), Arc::clone(&metrics));
        tasks.spawn(refresher.run(CancellationToken::new()));
        Self {
            cell,
            clock,
            mint,
            metrics,
            _tasks: tasks,
        }
    }

    /// When the calls were made, counted from the start.
    fn calls(&self) -> Vec<Duration> {
        self.mint.calls.lock().unwrap().clone()
    }

    async fn first(&self) -> Arc<Credential> {
        self.cell.get(within(MINUTE)).await.unwrap()
    }
}

/// The time between each call and the next.
fn gaps(calls: &[Duration]) -> Vec<Duration> {
    calls
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]))
        .collect()
}

fn cause() -> Cause {
    Cause::login("me", "db", false)
}

fn within(wait: Duration) -> Instant {
    Instant::now() + wait
}

#[tokio::test(start_paused = true)]
async fn a_client_that_comes_first_waits_for_the_first_credential() {
    let rig = Rig::start(|_, _| Step::GivesAfter(Duration::from_secs(3), HOUR));
    assert!(rig.cell.current().is_none());
    let credential = rig.first().await;
    assert_eq!(credential.secret.expose_secret(), "secret 0");
    assert_eq!(credential.generation, 1);
    assert_eq!(rig.mint.started.elapsed(), Duration::from_secs(3));
    assert_eq!(rig.cell.status().state, CredentialState::Fresh);
}

#[tokio::test(start_paused = true)]
async fn a_credential_is_refreshed_near_half_its_life_without_a_gap() {
    let rig = Rig::start(|_, _| Step::Gives(HOUR));
    rig.first().await;
    for _ in 0..24 * 60 {
        sleep(MINUTE).await;
        assert!(rig.cell.current().is_some());
    }
    let calls = rig.calls();
    for apart in gaps(&calls) {
        assert!(
            apart >= 27 * MINUTE && apart <= 33 * MINUTE + Duration::from_secs(1),
            "{apart:?}"
        );
    }
    assert!(
        (43..=54).contains(&calls.len()),
        "{} calls a day",
        calls.len()
    );
    let spread = gaps(&calls).into_iter().collect::<HashSet<_>>();
    assert!(spread.len() > 10, "a fleet would mint in step");
}

#[tokio::test(start_paused = true)]
async fn a_minute_is_refreshed_in_time_and_a_few_seconds_do_not_make_it_spin() {
    for (lifetime, most_per_hour) in [(60, 140), (6, 720), (1, 720)] {
        let rig = Rig::start(move |_, _| Step::Gives(Duration::from_secs(lifetime)));
        rig.first().await;
        while rig.mint.started.elapsed() < HOUR {
            sleep(Duration::from_millis(500)).await;
            let is_lasting = lifetime > 5;
            assert!(
                rig.cell.current().is_some() || !is_lasting,
                "without at {lifetime} s"
            );
        }
        let calls = rig.calls();
        assert!(
            calls.len() <= most_per_hour,
            "{} calls an hour at {lifetime} s",
            calls.len()
        );
        assert!(
            gaps(&calls)
                .iter()
                .all(|gap| *gap >= Duration::from_secs(5))
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_valid_credential_outlives_failed_refreshes() {
    let rig = Rig::start(|n, _| {
        if n == 0 {
            Step::Gives(HOUR)
        } else {
            Step::Fails(CallErrorKind::Unavailable)
        }
    });
    rig.first().await;
    while rig.mint.started.elapsed() + Duration::from_secs(1) < HOUR {
        sleep(Duration::from_secs(1)).await;
        if rig.mint.started.elapsed() < HOUR {
            assert!(
                rig.cell.current().is_some(),
                "thrown away at {:?}",
                rig.mint.started.elapsed()
            );
        }
    }
    let calls = rig.calls();
    let urgent = calls.iter().filter(|at| **at >= 55 * MINUTE).count();
    let due = calls.len() - urgent;
    assert!((30..=140).contains(&due), "{due} attempts while due");
    assert!(
        (200..=600).contains(&urgent),
        "{urgent} attempts in the last five minutes"
    );
    assert!(rig.cell.status().last_error.is_some());
    sleep(Duration::from_secs(2)).await;
    assert!(rig.cell.current().is_none());
    assert_eq!(rig.cell.status().state, CredentialState::Expired);
}

#[tokio::test(start_paused = true)]
async fn the_first_success_after_an_outage_is_taken_at_once() {
    let rig = Rig::start(|n, at| {
        if n > 0 && at < 2 * HOUR {
            Step::Fails(CallErrorKind::Unavailable)
        } else {
            Step::Gives(HOUR)
        }
    });
    rig.first().await;
    sleep(2 * HOUR + Duration::from_secs(46)).await;
    assert!(rig.cell.current().is_some());
    assert!(rig.cell.status().last_error.is_none());
    assert!(
        rig.calls().len() < 700,
        "{} calls during the outage",
        rig.calls().len()
    );
}

#[tokio::test(start_paused = true)]
async fn clients_wait_for_their_budget_and_then_get_the_reason() {
    let rig = Rig::start(|_, _| Step::Fails(CallErrorKind::Unavailable));
    let error = rig.cell.get(within(MINUTE)).await.unwrap_err();
    assert_eq!(rig.mint.started.elapsed(), MINUTE);
    let CredentialError::Failed(cause) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(cause.kind, CallErrorKind::Unavailable);
    assert!(
        error
            .message()
            .starts_with("cannot obtain a database credential: scripted failure"),
        "{}",
        error.message()
    );
    assert_eq!(error.hint().as_deref(), Some("fix the script"));
    let calls = rig.calls().len();
    assert!(
        (12..=60).contains(&calls),
        "{calls} attempts while a client waited"
    );
}

#[tokio::test(start_paused = true)]
async fn a_client_does_not_wait_for_what_only_a_person_can_fix() {
    let rig = Rig::start(|_, _| Step::Fails(CallErrorKind::Refused));
    let started = Instant::now();
    let error = rig.cell.get(within(MINUTE)).await.unwrap_err();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    assert!(
        matches!(error, CredentialError::Failed(cause) if cause.kind == CallErrorKind::Refused)
    );

    // Clients that come back again and again hasten the retries, within bounds.
    while started.elapsed() < HOUR {
        let started = Instant::now();
        rig.cell.get(within(MINUTE)).await.unwrap_err();
        assert!(
            started.elapsed() <= Duration::from_secs(6),
            "held for {:?}",
            started.elapsed()
        );
        sleep(Duration::from_millis(100)).await;
    }
    let calls = rig.calls().len();
    assert!((100..=260).contains(&calls), "{calls} calls in an hour");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_no_client_waits_for_is_retried_every_minute() {
    let rig = Rig::start(|_, _| Step::Fails(CallErrorKind::Refused));
    sleep(6 * HOUR).await;
    let calls = rig.calls();
    assert!(
        (240..=720).contains(&calls.len()),
        "{} calls in six hours",
        calls.len()
    );
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_honored_while_no_client_comes() {
    let wait = Duration::from_mins(5);
    let rig = Rig::start(move |n, _| match n {
        0 => Step::RequestsWait(wait),
        _ => Step::Gives(HOUR),
    });
    sleep(wait + Duration::from_secs(2)).await;
    let calls = rig.calls();
    assert_eq!(calls.len(), 2);
    assert!(calls[1] >= wait, "{calls:?}");
}

/// Clients were once held for 30 s each, and a limit that had been lifted cost them its whole time.
#[tokio::test(start_paused = true)]
async fn a_long_retry_after_is_reported_at_once_and_tried_earlier_for_a_client_within_bounds() {
    let well_after = Duration::from_secs(100);
    let rig = Rig::start(move |_, elapsed| {
        if elapsed < well_after {
            Step::RequestsWait(Duration::from_mins(5))
        } else {
            Step::Gives(HOUR)
        }
    });
    let started = Instant::now();
    loop {
        let started = Instant::now();
        match rig.cell.get(within(MINUTE)).await {
            Ok(_) => break,
            Err(CredentialError::Failed(error)) => {
                assert_eq!(error.kind, CallErrorKind::RateLimited);
            }
            Err(other) => panic!("{other:?}"),
        }
        let held = started.elapsed();
        assert!(held <= HOLD, "held for {held:?}");
        sleep(Duration::from_millis(100)).await;
    }
    let recovered = started.elapsed();
    assert!(
        recovered < well_after + Duration::from_secs(16),
        "{recovered:?}"
    );
    let calls = rig.calls();
    for gap in gaps(&calls) {
        assert!(gap >= Duration::from_secs(15), "{calls:?}");
    }
}

/// No client is sent to a proxy that is not ready, so that readiness must not depend on one.
#[tokio::test(start_paused = true)]
async fn an_outage_before_the_first_credential_ends_within_seconds_without_a_waiting_client() {
    for minutes in [1, 5] {
        let outage = MINUTE * minutes;
        let rig = Rig::start(move |_, elapsed| {
            if elapsed < outage {
                Step::Fails(CallErrorKind::Unavailable)
            } else {
                Step::Gives(HOUR)
            }
        });
        sleep(outage + Duration::from_secs(5)).await;
        assert!(rig.cell.status().is_ready(), "{:?}", rig.calls().last());
    }
}

#[tokio::test(start_paused = true)]
async fn a_mint_that_hangs_is_given_up_and_tried_again() {
    let rig = Rig::start(|n, _| {
        if n == 0 {
            Step::Hangs
        } else {
            Step::Gives(HOUR)
        }
    });
    let credential = rig.cell.get(within(10 * MINUTE)).await.unwrap();
    assert_eq!(credential.generation, 1);
    let latest = refresher::MINT_TIMEOUT + Duration::from_secs(2);
    assert!(rig.calls()[1] <= latest, "{:?}", rig.calls());
}

/// The steps of a mint may take 10, 30 and 30 s and succeed; after 60 s it was ended and began anew, for ever.
#[tokio::test(start_paused = true)]
async fn a_slow_mint_whose_steps_all_succeed_is_not_ended() {
    for slow in [Duration::from_secs(70), crate::workspace::MINT_TIMEOUT] {
        let rig = Rig::start(move |_, _| Step::GivesAfter(slow, HOUR));
        let credential = rig.cell.get(within(10 * MINUTE)).await.unwrap();
        assert_eq!((credential.generation, rig.calls().len()), (1, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspended_laptop_is_noticed_within_thirty_seconds() {
    let rig = Rig::start(|_, _| Step::Gives(HOUR));
    rig.first().await;
    sleep(MINUTE).await;
    rig.clock.jump(SignedDuration::from_hours(3));
    assert!(rig.cell.current().is_none(), "judged by the wall clock");
    assert_eq!(rig.cell.status().state, CredentialState::Expired);
    sleep(Duration::from_secs(31)).await;
    assert_eq!(rig.cell.current().unwrap().generation, 2);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_meets_an_expired_credential_wakes_the_refresher() {
    let rig = Rig::start(|_, _| Step::Gives(HOUR));
    rig.first().await;
    sleep(MINUTE).await;
    rig.clock.jump(SignedDuration::from_hours(3));
    let started = Instant::now();
    assert_eq!(rig.cell.get(within(MINUTE)).await.unwrap().generation, 2);
    assert!(started.elapsed() < Duration::from_secs(1));
}

/// Outages of up to 25 minutes with at least 10 minutes between them, of each kind: none covers the whole time between
/// the earliest refresh (33 minutes before expiry at the latest) and expiry, so a good refresher is never without.
fn outages(seed: u64) -> Vec<(Duration, Duration, Step)> {
    let mut state = seed;
    let mut random = |below: u64| {
        // SplitMix64: the same life for the same seed.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    };
    let mut outages = Vec::new();
    let mut at = MINUTE;
    while at < 6 * HOUR {
        let from = at + Duration::from_secs(random(3_000));
        let until = from + Duration::from_secs(1 + random(25 * 60));
        let kind = match random(5) {
            0 => Step::Hangs,
            1 => Step::RequestsWait(Duration::from_secs(1 + random(60))),
            2 => Step::Fails(CallErrorKind::Malformed),
            _ => Step::Fails(CallErrorKind::Unavailable),
        };
        outages.push((from, until, kind));
        at = until + 10 * MINUTE;
    }
    outages
}

#[tokio::test(start_paused = true)]
async fn six_hours_of_faults_leave_no_client_without_an_available_credential() {
    for seed in 0..20 {
        let faults = outages(seed);
        let rig = Rig::start(move |_, at| {
            let fault = faults
                .iter()
                .find(|(from, until, _)| (*from..*until).contains(&at));
            fault.map_or(Step::Gives(HOUR), |(.., step)| *step)
        });
        rig.first().await;
        let began = Instant::now();
        while began.elapsed() < 6 * HOUR {
            sleep(Duration::from_secs(10)).await;
            assert!(
                rig.cell.current().is_some(),
                "seed {seed}: none after {:?}",
                began.elapsed()
            );
        }
        let calls = rig.calls();
        for hour in 0..6 {
            let count = calls
                .iter()
                .filter(|at| (hour * HOUR..(hour + 1) * HOUR).contains(*at))
                .count();
            // Mostly those of the last five minutes of a lifetime, with a call a second.
            assert!(count <= 400, "seed {seed}: {count} calls in hour {hour}");
        }
        let minted = rig.cell.status().generation;
        assert!(
            (6..=14).contains(&minted),
            "seed {seed}: {minted} mints in six hours"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn replicas_that_start_together_do_not_stay_in_step() {
    let rigs: Vec<Rig> = (0..20)
        .map(|_| Rig::start(|_, _| Step::Gives(HOUR)))
        .collect();
    sleep(6 * HOUR).await;
    let mut tenth: Vec<Duration> = rigs.iter().map(|rig| rig.calls()[9]).collect();
    tenth.sort_unstable();
    let spread = tenth[tenth.len() - 1].saturating_sub(tenth[0]);
    assert!(spread > 2 * MINUTE, "twenty replicas within {spread:?}");
    let crowd = tenth
        .windows(5)
        .map(|five| five[4].saturating_sub(five[0]))
        .min()
        .unwrap();
    assert!(
        crowd > Duration::from_secs(1),
        "five of them within {crowd:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_hundred_rejected_clients_share_one_mint() {
    let rig = Rig::start(|_, _| Step::GivesAfter(Duration::from_secs(1), HOUR));
    rig.first().await;
    sleep(MINUTE).await;
    let mut clients = JoinSet::new();
    for _ in 0..100 {
        let cell = rig.cell.clone();
        clients.spawn(async move {
            cell.wait_for_newer(1, cause(), within(MINUTE))
                .await
                .unwrap()
                .generation
        });
    }
    while let Some(generation) = clients.join_next().await {
        assert_eq!(generation.unwrap(), 2);
    }
    assert_eq!(rig.calls().len(), 2);
    // One that comes late with the old generation is given the new one without a mint.
    assert_eq!(
        rig.cell
            .wait_for_newer(1, cause(), within(MINUTE))
            .await
            .unwrap()
            .generation,
        2
    );
    assert_eq!(rig.calls().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_credential_is_replaced_even_by_one_that_expires_earlier() {
    let rig = Rig::start(|n, _| Step::Gives(if n == 0 { HOUR } else { 10 * MINUTE }));
    rig.first().await;
    sleep(MINUTE).await;
    assert_eq!(
        rig.cell
            .wait_for_newer(1, cause(), within(MINUTE))
            .await
            .unwrap()
            .generation,
        2
    );
}

#[tokio::test(start_paused = true)]
async fn a_new_credential_that_expires_no_later_is_not_used_and_not_requested_in_a_loop() {
    let rig = Rig::start(|_, _| Step::GivesUntil(HOUR));
    rig.first().await;
    sleep(59 * MINUTE).await;
    assert_eq!(rig.cell.current().unwrap().generation, 1);
    let calls = rig.calls().len();
    assert!((10..=80).contains(&calls), "{calls} calls");
}

#[tokio::test(start_paused = true)]
async fn a_permanent_mismatch_does_not_hammer_the_workspace() {
    let rig = Rig::start(|_, _| Step::Gives(HOUR));
    let mut generation = rig.first().await.generation;
    let started = Instant::now();
    let mut refused_at_once = 0;
    while started.elapsed() < 2 * HOUR {
        let started = Instant::now();
        match rig
            .cell
            .wait_for_newer(generation, cause(), within(MINUTE))
            .await
        {
            Ok(credential) => generation = credential.generation,
            Err(CredentialError::RateLimited { retry_in }) => {
                assert!(retry_in > Duration::from_secs(5));
                assert!(started.elapsed() < Duration::from_secs(1));
                refused_at_once += 1;
            }
            Err(other) => panic!("{other:?}"),
        }
        sleep(Duration::from_secs(1)).await;
    }
    let calls = rig.calls().len();
    assert!(
        (15..=45).contains(&calls),
        "{calls} mints in two hours of rejection"
    );
    assert!(refused_at_once > 1000);

    // The role is made: logins work, and a later rejection is served promptly again.
    rig.cell.accepted(generation, cause());
    let started = Instant::now();
    let credential = rig
        .cell
        .wait_for_newer(generation, cause(), within(MINUTE))
        .await
        .unwrap();
    assert!(credential.generation > generation);
    assert!(
        started.elapsed() <= Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
}

/// Each success elsewhere once renewed the budget: 19 mints in 90 s, for ever.
#[tokio::test(start_paused = true)]
async fn a_database_that_refuses_beside_one_that_accepts_does_not_hammer_the_workspace() {
    for was_accepted in [false, true] {
        let rig = Rig::start(|_, _| Step::Gives(HOUR));
        let [good, bad] = ["good", "bad"].map(|name| Cause::login("me", name, false));
        let first = rig.first().await.generation;
        rig.cell.accepted(first, good);
        if was_accepted {
            rig.cell.accepted(first, bad);
        }
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(90) {
            let generation = rig.first().await.generation;
            let _ = rig
                .cell
                .wait_for_newer(generation, bad, within(MINUTE))
                .await;
            rig.cell.accepted(rig.first().await.generation, good);
            sleep(Duration::from_millis(500)).await;
        }
        let mints = rig.calls().len();
        assert!(mints <= 6, "{mints} mints in 90 s");

        // The credential is revoked: the database that accepted it has a budget of its own.
        let started = Instant::now();
        let generation = rig.first().await.generation;
        let fresh = rig
            .cell
            .wait_for_newer(generation, good, within(MINUTE))
            .await;
        assert!(fresh.unwrap().generation > generation);
        let took = started.elapsed();
        assert!(took <= Duration::from_secs(6), "{took:?}");
    }
}

/// A client can name any number of databases, and be refused in each.
#[tokio::test(start_paused = true)]
async fn a_client_that_is_refused_in_ever_other_databases_does_not_use_up_the_budget_of_others() {
    let rig = Rig::start(|_, _| Step::Gives(HOUR));
    let good = Cause::login("me", "good", false);
    rig.cell.accepted(rig.first().await.generation, good);
    for attempt in 0..600 {
        let generation = rig.first().await.generation;
        let cause = Cause::login("me", &format!("d{attempt}"), false);
        let _ = rig
            .cell
            .wait_for_newer(generation, cause, within(MINUTE))
            .await;
        sleep(Duration::from_millis(500)).await;
    }
    let mints = rig.calls().len();
    assert!(mints <= 10, "{mints} mints in five minutes");
    let started = Instant::now();
    let generation = rig.first().await.generation;
    let fresh = rig
        .cell
        .wait_for_newer(generation, good, within(MINUTE))
        .await;
    assert!(fresh.unwrap().generation > generation);
    let took = started.elapsed();
    assert!(took <= Duration::from_secs(6), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_static_credential_is_minted_once_unless_it_is_rejected() {
    let rig = Rig::start(|_, _| Step::GivesForever);
    rig.first().await;
    sleep(100 * HOUR).await;
    assert_eq!(rig.calls().len(), 1);
    assert_eq!(rig.cell.status().state, CredentialState::Fresh);
    rig.cell
        .wait_for_newer(1, cause(), within(MINUTE))
        .await
        .unwrap();
    sleep(100 * HOUR).await;
    assert_eq!(rig.calls().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_credential_that_has_already_expired_is_a_failure() {
    let rig = Rig::start(|_, _| Step::Gives(Duration::ZERO));
    let error = rig.cell.get(within(MINUTE)).await.unwrap_err();
    assert!(
        error.message().contains("already expired"),
        "{}",
        error.message()
    );
    assert!(rig.calls().len() <= 60);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_leaves_nothing_behind() {
    let rig = Rig::start(|_, _| Step::Fails(CallErrorKind::Unavailable));
    for _ in 0..50 {
        tokio::select! {
            biased;
            _ = rig.cell.get(within(MINUTE)) => panic!("there is no credential"),
            () = sleep(Duration::from_millis(10)) => {}
        }
    }
    assert!(!rig.cell.demand().exists());
}

#[tokio::test(start_paused = true)]
async fn followers_see_each_refresh_and_the_metrics_count_it() {
    let rig = Rig::start(|n, _| {
        if n == 1 {
            Step::Fails(CallErrorKind::RateLimited)
        } else {
            Step::Gives(MINUTE)
        }
    });
    let mut status = rig.cell.subscribe();
    status
        .wait_for(|status| status.generation == 1)
        .await
        .unwrap();
    status
        .wait_for(|status| status.last_error.is_some())
        .await
        .unwrap();
    let third = status
        .wait_for(|status| status.generation == 2)
        .await
        .unwrap()
        .clone();
    assert!(third.expires_at > third.minted_at);
    tokio::task::yield_now().await;
    let count = |outcome: RefreshOutcome| rig.metrics.credential_refreshes[outcome].get();
    assert_eq!(
        (
            count(RefreshOutcome::Success),
            count(RefreshOutcome::RateLimited)
        ),
        (2, 1)
    );
    #[expect(clippy::cast_precision_loss, reason = "seconds fit")]
    let expiry = third.expires_at.unwrap().as_second() as f64;
    assert!((rig.metrics.credential_expiry.get() - expiry).abs() < 1.0);
}

#[tokio::test(start_paused = true)]
async fn stopping_ends_the_task_even_in_the_middle_of_a_mint() {
    let clock = Clock::simulated(Timestamp::now());
    let mint = Scripted {
        clock: clock.clone(),
        origin: clock.now(),
        started: Instant::now(),
        calls: Arc::default(),
        script: Arc::new(|_, _| Step::Hangs),
    };
    let stop = CancellationToken::new();
    let refresher = Refresher::new(
        Arc::new(mint.clone()),
        CredentialCell::new(clock),
        Metrics::new().unwrap(),
    );
    let mut tasks = JoinSet::new();
    tasks.spawn(refresher.run(stop.clone()));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(mint.calls.lock().unwrap().len(), 1);
    stop.cancel();
    let started = Instant::now();
    tasks.join_next().await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_millis(10));
}

#[test]
fn no_secret_prints() {
    let cell = CredentialCell::new(Clock::system());
    let minted = Minted {
        secret: "hunter2".into(),
        expires_at: None,
    };
    let printed = format!("{minted:?}");
    let credential = cell.publish(minted, 0.0);
    let printed = format!("{printed} {credential:?} {cell:?} {:?}", cell.status());
    assert!(!printed.contains("hunter2"), "{printed}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_fails_the_pace_is_bounded_and_the_valid_credential_stays(
        lifetime in 1_u64..8_000,
        outcomes in proptest::collection::vec(0_u8..6, 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async move {
            let rig = Rig::start(move |n, _| match outcomes[n % outcomes.len()] {
                0 => Step::Fails(CallErrorKind::Unavailable),
                1 => Step::Fails(CallErrorKind::Refused),
                2 => Step::Fails(CallErrorKind::Malformed),
                3 => Step::RequestsWait(Duration::from_secs(7)),
                _ => Step::Gives(Duration::from_secs(lifetime)),
            });
            let mut latest: Option<Arc<Credential>> = None;
            while rig.mint.started.elapsed() < 2 * HOUR {
                sleep(Duration::from_secs(7)).await;
                if let Some(before) = &latest
                    && before.is_valid_at(rig.clock.now())
                {
                    let now = rig.cell.current().expect("a valid credential was thrown away");
                    assert!(now.expires_at >= before.expires_at);
                }
                latest = rig.cell.current().or(latest);
            }
            let calls = rig.calls();
            assert!(gaps(&calls).iter().all(|gap| *gap >= Duration::from_millis(500)));
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_lazy_credential_is_refreshed_for_a_client_and_for_nothing_else() {
    let rig = Rig::lazy(|_, _| Step::GivesAfter(Duration::from_secs(1), HOUR));
    assert_eq!(rig.first().await.generation, 1);
    // Long after its expiry none has been minted, and the proxy is ready all the same.
    sleep(5 * HOUR).await;
    assert_eq!(rig.calls().len(), 1);
    let status = rig.cell.status();
    assert_eq!(status.state, CredentialState::Expired);
    assert!(status.is_ready() && status.next_attempt.is_none());
    // Clients that come together share one mint.
    let (one, other) = tokio::join!(rig.first(), rig.first());
    assert_eq!((one.generation, other.generation), (2, 2));
    assert_eq!(rig.calls().len(), 2);

    sleep(55 * MINUTE).await;
    assert_eq!(rig.first().await.generation, 2, "5 minutes are enough");
    sleep(2 * MINUTE).await;
    assert_eq!(rig.first().await.generation, 3, "3 are not");
    assert_eq!(rig.calls().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_lazy_credential_that_cannot_be_replaced_is_used_as_long_as_it_is_valid() {
    let rig = Rig::lazy(|n, _| match n {
        0 | 3.. => Step::Gives(HOUR),
        1 => Step::Hangs,
        _ => Step::Fails(CallErrorKind::Refused),
    });
    rig.first().await;
    sleep(57 * MINUTE).await;
    let started = Instant::now();
    assert_eq!(rig.first().await.generation, 1);
    assert!(started.elapsed() <= Duration::from_secs(5), "a short wait");
    sleep(MINUTE + Duration::from_secs(30)).await;
    assert_eq!(rig.first().await.generation, 1);
    assert!(rig.cell.status().is_ready());
    sleep(2 * MINUTE).await;
    // It has expired after a failure: no client is sent to a proxy that is not ready.
    let healed = rig
        .cell
        .subscribe()
        .wait_for(|status| status.generation == 2)
        .await
        .map(|_| ());
    healed.unwrap();
    assert!(rig.cell.status().is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_missing_credential_is_retried_even_with_refresh_on_demand() {
    let rig = Rig::lazy(|_, elapsed| {
        if elapsed < MINUTE {
            Step::Fails(CallErrorKind::Unavailable)
        } else {
            Step::Gives(HOUR)
        }
    });
    sleep(Duration::from_secs(10)).await;
    assert!(!rig.cell.status().is_ready());
    let mut status = rig.cell.subscribe();
    status
        .wait_for(|status| status.generation == 1)
        .await
        .unwrap();
    assert!(rig.cell.status().is_ready());
    let calls = rig.calls().len();
    sleep(10 * HOUR).await;
    assert_eq!(rig.calls().len(), calls);
}

#[tokio::test(start_paused = true)]
async fn a_lazy_credential_of_a_minute_does_not_make_it_spin() {
    let rig = Rig::lazy(|_, _| Step::Gives(MINUTE));
    while rig.mint.started.elapsed() < HOUR {
        rig.first().await;
        sleep(Duration::from_millis(100)).await;
    }
    let calls = rig.calls();
    assert!((100..=130).contains(&calls.len()), "{} calls", calls.len());
}

#[tokio::test(start_paused = true)]
async fn a_lazy_credential_that_is_rejected_is_replaced_at_once() {
    let rig = Rig::lazy(|_, _| Step::Gives(HOUR));
    let first = rig.first().await;
    let second = rig
        .cell
        .wait_for_newer(first.generation, cause(), within(MINUTE))
        .await
        .unwrap();
    assert_eq!(second.generation, 2);
}

#[test]
fn the_newest_attempt_is_first_and_old_ones_are_dropped() {
    let cell = CredentialCell::new(Clock::system());
    for second in 0..100 {
        let attempt = MintAttempt {
            at: Timestamp::from_second(second).unwrap(),
            took: Duration::ZERO,
            outcome: Ok(None),
        };
        cell.attempt_ended(attempt, Instant::now());
    }
    let latest = cell.attempts();
    assert_eq!(latest.len(), 30);
    assert_eq!(latest[0].at.as_second(), 99);
}
