//! Relays over in-memory streams with a paused clock: traffic, backpressure, and the end of each side.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Wake, Waker},
};

use bytes::BytesMut;
use proptest::prelude::*;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{pipe::BUFFER_LEN, *};
use crate::{
    net::socket::Socket,
    protocol::{
        error::ErrorFields,
        frame::{HEADER_LEN, tag, take_message},
    },
};

const ROOM: usize = 64 * 1024;

fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag][..], &length.to_be_bytes(), body].concat()
}

fn query() -> Vec<u8> {
    frame(b'Q', b"select 1\0")
}

fn ready(status: u8) -> Vec<u8> {
    frame(b'Z', &[status])
}

fn fatal() -> Vec<u8> {
    frame(b'E', b"SFATAL\0C57P01\0Mterminating connection\0\0")
}

fn counter() -> IntCounter {
    IntCounter::new("bytes", "bytes").unwrap()
}

fn side<S>(stream: &mut S, received: BytesMut) -> Side<'_, S> {
    Side {
        stream,
        received,
        counted: 0,
        bytes: counter(),
    }
}

fn observers<'a>(activity: &'a ActivityRecord, metrics: &'a Metrics) -> Observers<'a> {
    Observers {
        activity,
        metrics,
        loss_timeout: None,
        ends_at_rest: false,
        keeps_server: false,
        traces: None,
        pools: None,
    }
}

/// A relay under way, seen from both of its ends.
struct Session {
    client: DuplexStream,
    server: DuplexStream,
    breaks: Breaks,
    shutdown: Shutdown,
    metrics: Arc<Metrics>,
    relay: JoinSet<End>,
}

/// Lets a test reset either side's connection.
#[derive(Clone, Default)]
struct Breaks {
    client: Arc<Switch>,
    server: Arc<Switch>,
}

impl Session {
    fn begin() -> Self {
        Self::with((ROOM, ROOM), &[], &[])
    }

    fn with((client_room, server_room): (usize, usize), early: &[u8], leftover: &[u8]) -> Self {
        let (client, our_client) = duplex(client_room);
        let (server, our_server) = duplex(server_room);
        let breaks = Breaks::default();
        let shutdown = Shutdown::new();
        let mut client_end = Breakable::new(our_client, &breaks.client);
        let mut server_end = Breakable::new(our_server, &breaks.server);
        let (early, leftover) = (BytesMut::from(early), BytesMut::from(leftover));
        let watched = shutdown.clone();
        let metrics = Metrics::new().unwrap();
        let counted = Arc::clone(&metrics);
        let mut relay = JoinSet::new();
        relay.spawn(async move {
            let activity = ActivityRecord::new(Instant::now());
            let mut relay = Relay::new(
                side(&mut client_end, early),
                side(&mut server_end, leftover),
                &watched,
                observers(&activity, &counted),
            );
            relay.run().await
        });
        Self {
            client,
            server,
            breaks,
            shutdown,
            metrics,
            relay,
        }
    }

    /// Relays one query to the server.
    async fn query(&mut self) {
        self.client.write_all(&query()).await.unwrap();
        let mut received = vec![0; query().len()];
        self.server.read_exact(&mut received).await.unwrap();
        assert_eq!(received, query());
    }

    /// Queries and transactions counted, and their times in milliseconds.
    fn measured(&self) -> [u64; 4] {
        let metrics = &self.metrics;
        [
            metrics.queries.get(),
            metrics.query_seconds.micros() / 1000,
            metrics.transactions.get(),
            metrics.transaction_seconds.micros() / 1000,
        ]
    }

    /// Relays `bytes` from the server to the client.
    async fn reply(&mut self, bytes: &[u8]) {
        self.server.write_all(bytes).await.unwrap();
        let mut received = vec![0; bytes.len()];
        self.client.read_exact(&mut received).await.unwrap();
        assert_eq!(received, bytes);
    }

    async fn ended(&mut self) -> End {
        let ended = timeout(Duration::from_hours(1), self.relay.join_next());
        ended
            .await
            .expect("the relay does not end")
            .unwrap()
            .unwrap()
    }

    /// The end, and what the client receives until then.
    async fn until_end(&mut self) -> (End, Vec<u8>) {
        let mut words = Vec::new();
        let client = &mut self.client;
        let end = tokio::join!(self.relay.join_next(), client.read_to_end(&mut words)).0;
        (end.unwrap().unwrap(), words)
    }

    async fn is_waiting(&mut self) -> bool {
        timeout(Duration::from_hours(1), self.relay.join_next())
            .await
            .is_err()
    }
}

/// The SQLSTATEs of the errors in a stream of whole messages.
fn errors(words: &[u8]) -> Vec<String> {
    let mut buffer = BytesMut::from(words);
    let mut codes = Vec::new();
    while let Some(message) = take_message(&mut buffer, ROOM).unwrap() {
        if message.tag == tag::ERROR_RESPONSE {
            codes.push(ErrorFields::parse(message.body()).code);
        }
    }
    assert!(buffer.is_empty(), "words end inside a message: {buffer:?}");
    codes
}

/// What a connection does once it has been switched: it resets, reads or writes or both.
#[derive(Default)]
struct Switch {
    reads: AtomicBool,
    writes: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
}

impl Switch {
    fn reset(&self) {
        self.reads.store(true, Ordering::SeqCst);
        self.refuse_writes();
    }

    fn refuse_writes(&self) {
        self.writes.store(true, Ordering::SeqCst);
        for waker in self.wakers.lock().unwrap().drain(..) {
            waker.wake();
        }
    }

    fn check(&self, flag: &AtomicBool, cx: &Context<'_>) -> io::Result<()> {
        self.wakers.lock().unwrap().push(cx.waker().clone());
        if flag.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }
}

struct Breakable {
    stream: DuplexStream,
    switch: Arc<Switch>,
}

impl Transport for Breakable {
    fn socket(&self) -> Option<&Socket> {
        None
    }
}

impl ServerStream for Breakable {}

impl ServerStream for DuplexStream {}

impl Breakable {
    fn new(stream: DuplexStream, switch: &Arc<Switch>) -> Self {
        Self {
            stream,
            switch: Arc::clone(switch),
        }
    }
}

impl AsyncRead for Breakable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // What came before a reset can still be read.
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Pending => match self.switch.check(&self.switch.reads, cx) {
                Ok(()) => Poll::Pending,
                Err(error) => Poll::Ready(Err(error)),
            },
            ready @ Poll::Ready(_) => ready,
        }
    }
}

impl AsyncWrite for Breakable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.switch.check(&self.switch.writes, cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

// Traffic.

fn messages() -> impl Strategy<Value = Vec<u8>> {
    let body = prop_oneof![
        8 => prop::collection::vec(any::<u8>(), 0..40),
        1 => prop::collection::vec(any::<u8>(), 0..70_000),
    ];
    prop::collection::vec((any::<u8>(), body), 0..12).prop_map(|messages| {
        let frames = messages.into_iter().map(|(tag, body)| frame(tag, &body));
        frames.flatten().collect()
    })
}

async fn write_in_pieces(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8], pieces: &[usize]) {
    let mut pieces = pieces.iter().copied().cycle();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (piece, left) = rest.split_at(pieces.next().unwrap_or(1000).min(rest.len()));
        to.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
        rest = left;
    }
}

fn run_paused<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bytes_arrive_unchanged_in_both_directions(
        passwords in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..3),
        from_client in messages(),
        from_server in messages(),
        early in any::<prop::sample::Index>(),
        leftover in any::<prop::sample::Index>(),
        pieces in prop::collection::vec(1..9000_usize, 1..20),
        room in 1..9000_usize,
    ) {
        // Without a request, passwords are dropped at the start only; any other message ends that.
        let mut expected = query();
        expected.extend_from_slice(&from_client);
        let mut sent: Vec<u8> = passwords.iter().flat_map(|password| frame(b'p', password)).collect();
        sent.extend_from_slice(&expected);
        let (early, sent) = sent.split_at(early.index(sent.len() + 1).min(9000));
        let (leftover, answers) = from_server.split_at(leftover.index(from_server.len() + 1));
        let (server_received, client_received, end) = run_paused(async {
            let Session { mut client, mut server, mut relay, .. } = Session::with((room, room), early, leftover);
            let (mut client_reads, mut client_writes) = tokio::io::split(&mut client);
            let (mut server_reads, mut server_writes) = tokio::io::split(&mut server);
            let mut by_server = Vec::new();
            let mut by_client = vec![0; from_server.len()];
            tokio::join!(
                write_in_pieces(&mut client_writes, sent, &pieces),
                write_in_pieces(&mut server_writes, answers, &pieces),
                async { client_reads.read_exact(&mut by_client).await.unwrap(); },
                async {
                    by_server.resize(expected.len(), 0);
                    server_reads.read_exact(&mut by_server).await.unwrap();
                },
            );
            client_writes.shutdown().await.unwrap();
            server_reads.read_to_end(&mut by_server).await.unwrap();
            server_writes.shutdown().await.unwrap();
            client_reads.read_to_end(&mut by_client).await.unwrap();
            (by_server, by_client, relay.join_next().await.unwrap().unwrap())
        });
        prop_assert!(server_received == expected, "the server received something else");
        prop_assert!(client_received == from_server, "the client received something else");
        // The bytes may happen to contain a Terminate.
        prop_assert!(matches!(end, End::Server | End::Client));
    }

    #[test]
    fn no_part_of_an_unsolicited_password_is_relayed(
        password in prop::collection::vec(any::<u8>(), 0..100),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let stream = [frame(b'p', &password), query(), frame(b'p', b"later, for the server to judge")].concat();
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        at.sort_unstable();
        let mut unsolicited = UnsolicitedPasswords::default();
        let (mut passed, mut from) = (Vec::new(), 0);
        for to in at.into_iter().chain([stream.len()]) {
            let mut chunk = &stream[from..to];
            unsolicited.strip(&mut chunk);
            passed.extend_from_slice(chunk);
            from = to;
        }
        prop_assert_eq!(passed, &stream[password.len() + HEADER_LEN..]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_unsolicited_password_with_an_invalid_length_is_not_relayed_either() {
    let mut session = Session::with((ROOM, ROOM), b"p\0\0", b"");
    session.client.write_all(b"\0\x02").await.unwrap();
    session.query().await;
}

/// Of what the other side sends to a reader that stops reading, only one buffer is read.
#[tokio::test(start_paused = true)]
async fn a_slow_reader_slows_its_sender_in_either_direction() {
    const SMALL: usize = 512;
    for from_server in [true, false] {
        let (client_room, server_room) = if from_server {
            (SMALL, ROOM)
        } else {
            (ROOM, SMALL)
        };
        let mut session = Session::with((client_room, server_room), b"", b"");
        let (sender, receiver) = if from_server {
            (&mut session.server, &mut session.client)
        } else {
            (&mut session.client, &mut session.server)
        };
        let message = frame(b'd', &[7; 1000]);
        let mut taken = 0;
        while let Ok(written) = timeout(Duration::from_secs(1), sender.write(&message)).await {
            taken += written.unwrap();
            assert!(
                taken <= ROOM + BUFFER_LEN + SMALL,
                "{taken} bytes were taken in"
            );
        }
        assert!(
            taken > ROOM + BUFFER_LEN / 2,
            "only {taken} bytes were taken in"
        );
        let mut delivered = vec![0; taken];
        receiver.read_exact(&mut delivered).await.unwrap();
        sender.write_all(&message).await.unwrap();
        receiver
            .read_exact(&mut delivered[..message.len()])
            .await
            .unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn queries_and_transactions_are_measured() {
    let mut session = Session::begin();
    let wait = async |millis| sleep(Duration::from_millis(millis)).await;
    session.query().await;
    wait(3).await;
    session.reply(&ready(b'I')).await;
    assert_eq!(session.measured(), [1, 3, 1, 3]);
    // Between two transactions nothing is measured.
    wait(1000).await;
    session.query().await;
    wait(5).await;
    session.reply(&ready(b'T')).await;
    assert_eq!(session.measured(), [2, 8, 1, 3]);
    // The client's own time is the transaction's.
    wait(100).await;
    session.query().await;
    wait(2).await;
    session.reply(&ready(b'I')).await;
    assert_eq!(session.measured(), [3, 10, 2, 110]);
    // The second query of a pipeline begins with the answer to the first.
    session.query().await;
    session.query().await;
    wait(10).await;
    session.reply(&ready(b'I')).await;
    wait(1).await;
    session.reply(&ready(b'I')).await;
    assert_eq!(session.measured(), [5, 21, 4, 121]);
    // Two answers at once have half of the time each.
    session.query().await;
    session.query().await;
    wait(8).await;
    session.reply(&[ready(b'I'), ready(b'I')].concat()).await;
    assert_eq!(session.measured(), [7, 29, 6, 129]);
}

/// The queue of requests is bounded, even for a client that pipelines without end before a server that answers nothing.
#[tokio::test(start_paused = true)]
async fn a_client_with_too_many_requests_in_flight_is_not_read_from_until_some_are_answered() {
    const PAIRS: usize = 200_000;
    let session = Session::begin();
    let (mut from_relay, mut to_relay) = tokio::io::split(session.server);
    let (mut replies, mut client) = tokio::io::split(session.client);
    let requests = [frame(b'S', b""), frame(b'Q', b"\0")]
        .concat()
        .repeat(PAIRS);
    let answers = [ready(b'I'), frame(b'C', b"\0"), ready(b'I')]
        .concat()
        .repeat(PAIRS);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { tokio::io::copy(&mut from_relay, &mut tokio::io::sink()).await });
    let mut sent = 0;
    while let Ok(written) = timeout(Duration::from_secs(1), client.write(&requests[sent..])).await {
        sent += written.unwrap();
    }
    assert!(sent < requests.len() / 2, "{sent} bytes were taken in");
    let mut received = vec![0; answers.len()];
    let all = async {
        tokio::try_join!(
            client.write_all(&requests[sent..]),
            to_relay.write_all(&answers),
            replies.read_exact(&mut received),
        )
    };
    timeout(Duration::from_hours(1), all)
        .await
        .unwrap()
        .unwrap();
    assert!(received == answers);
}

/// One gigabyte would take minutes here; what matters is that a message beyond any buffer is passed on as it comes.
#[tokio::test(start_paused = true)]
async fn a_message_is_not_held_until_it_is_whole() {
    let mut session = Session::begin();
    let header = [b'D', 0x3f, 0xff, 0xff, 0xff];
    session.reply(&header).await;
    for _ in 0..64 {
        session.reply(&[1; 16 * 1024]).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_session_holds_no_buffer() {
    let (mut client, mut our_client) = duplex(100);
    let (mut server, mut our_server) = duplex(100);
    let shutdown = Shutdown::new();
    let activity = ActivityRecord::new(Instant::now());
    let metrics = Metrics::new().unwrap();
    let mut relay = Relay::new(
        side(&mut our_client, BytesMut::new()),
        side(&mut our_server, BytesMut::new()),
        &shutdown,
        observers(&activity, &metrics),
    );
    let mut cx = Context::from_waker(Waker::noop());
    let reply = frame(b'D', &[0; 500]);
    let mut rest = &reply[..];
    let mut received = Vec::new();
    let mut held = 0;
    while received.len() < reply.len() {
        if let Ok(written) = timeout(Duration::ZERO, server.write(rest)).await {
            rest = &rest[written.unwrap()..];
        }
        assert!(relay.poll(&mut cx, Phase::Serving, &mut None).is_pending());
        held = held.max(relay.to_client.kept.len());
        let mut piece = [0; 30];
        if let Ok(read) = timeout(Duration::ZERO, client.read(&mut piece)).await {
            received.extend_from_slice(&piece[..read.unwrap()]);
        }
    }
    assert!(relay.poll(&mut cx, Phase::Serving, &mut None).is_pending());
    assert!(held > 0, "the client was too fast for this test");
    assert_eq!(relay.to_client.kept.capacity(), 0);
    assert_eq!(relay.to_server.kept.capacity(), 0);
    assert_eq!(relay.to_client.counter.get(), 505);
}

// The client's end.

#[tokio::test(start_paused = true)]
async fn replies_drain_after_a_client_has_closed_its_half() {
    let mut session = Session::begin();
    session.query().await;
    session.client.shutdown().await.unwrap();
    assert_eq!(
        session.server.read(&mut [0; 1]).await.unwrap(),
        0,
        "the server's half is closed"
    );
    for _ in 0..5 {
        sleep(Duration::from_secs(4)).await;
        session.reply(&frame(b'D', b"row")).await;
    }
    session.reply(&ready(b'I')).await;
    drop(session.server);
    let mut rest = Vec::new();
    session.client.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty(), "the client expects this end");
}

#[tokio::test(start_paused = true)]
async fn an_owed_reply_is_awaited_after_the_client_has_closed_its_half() {
    let mut session = Session::begin();
    session.query().await;
    session.client.shutdown().await.unwrap();
    sleep(Duration::from_hours(1)).await;
    session.reply(&frame(b'D', b"row")).await;
    session.reply(&ready(b'I')).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_owes_no_reply_has_limited_time_to_close() {
    let mut session = Session::begin();
    let began = Instant::now();
    drop(session.client);
    assert_eq!(
        session.relay.join_next().await.unwrap().unwrap(),
        End::Client
    );
    assert_eq!(began.elapsed().as_secs(), SERVER_CLOSE_TIMEOUT.as_secs());
    assert_eq!(session.server.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_resets_ends_its_server_at_once() {
    let mut session = Session::begin();
    session.query().await;
    let began = Instant::now();
    session.breaks.client.reset();
    assert_eq!(session.ended().await, End::Client);
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert!(session.server.write_all(b"x").await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_accepts_no_more_ends_its_server_at_once() {
    let mut session = Session::begin();
    session.query().await;
    session.breaks.client.refuse_writes();
    session
        .server
        .write_all(&frame(b'D', b"row"))
        .await
        .unwrap();
    assert_eq!(session.ended().await, End::Client);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_the_client_leaves_unfinished_is_not_completed() {
    let mut session = Session::begin();
    session.client.write_all(&query()[..9]).await.unwrap();
    drop(session.client);
    let mut received = Vec::new();
    session.server.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, &query()[..9]);
}

// The server's end.

#[tokio::test(start_paused = true)]
async fn a_fatal_error_is_delivered_and_nothing_follows_it() {
    let mut session = Session::begin();
    session.query().await;
    session
        .server
        .write_all(&frame(b'D', b"row"))
        .await
        .unwrap();
    session.server.write_all(&fatal()).await.unwrap();
    session.breaks.server.reset();
    let (end, words) = session.until_end().await;
    assert_eq!(end, End::Server);
    assert_eq!(words, [frame(b'D', b"row"), fatal()].concat());
}

#[tokio::test(start_paused = true)]
async fn a_fatal_error_right_behind_the_login_counts_too() {
    let mut session = Session::with((ROOM, ROOM), b"", &fatal());
    session.breaks.server.reset();
    let (end, words) = session.until_end().await;
    assert_eq!((end, words), (End::Server, fatal()));
}

#[tokio::test(start_paused = true)]
async fn a_fatal_error_waits_for_a_client_that_reads_slowly_but_not_for_ever() {
    let mut session = Session::with((16, ROOM), b"", b"");
    let reply = frame(b'D', &[0; 100]);
    session.server.write_all(&reply).await.unwrap();
    session.server.write_all(&fatal()).await.unwrap();
    drop(session.server);
    let mut words = Vec::new();
    while words.len() < reply.len() + fatal().len() {
        sleep(Duration::from_secs(20)).await;
        words.push(session.client.read_u8().await.unwrap());
        if words.len() == 5 {
            session.client.read_buf(&mut words).await.unwrap();
        }
    }
    assert_eq!(words, [reply.clone(), fatal()].concat());

    let mut session = Session::with((16, ROOM), b"", b"");
    let began = Instant::now();
    session
        .server
        .write_all(&frame(b'D', &[0; 11]))
        .await
        .unwrap();
    drop(session.server);
    assert_eq!(
        session.relay.join_next().await.unwrap().unwrap(),
        End::Server
    );
    assert_eq!(began.elapsed().as_secs(), DELIVERY_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_server_lost_between_two_messages_is_explained() {
    for reset in [true, false] {
        let mut session = Session::begin();
        session.query().await;
        session.reply(&frame(b'D', b"row")).await;
        if reset {
            session.breaks.server.reset();
        } else {
            session.server.shutdown().await.unwrap();
        }
        let (end, words) = session.until_end().await;
        assert_eq!(end, End::Server);
        assert_eq!(errors(&words), ["08006"]);
    }
}

#[tokio::test(start_paused = true)]
async fn no_error_is_sent_inside_a_message_that_the_server_leaves_unfinished() {
    for cut in 1..9 {
        let mut session = Session::begin();
        session.query().await;
        session.reply(&frame(b'D', b"row!")[..cut]).await;
        session.breaks.server.reset();
        let (end, words) = session.until_end().await;
        assert_eq!((end, words), (End::Server, Vec::new()), "{cut}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_sent_terminate_is_sent_no_error() {
    let mut session = Session::begin();
    session.client.write_all(&frame(b'X', b"")).await.unwrap();
    session.server.read_exact(&mut [0; 5]).await.unwrap();
    session.breaks.server.reset();
    let (end, words) = session.until_end().await;
    assert_eq!((end, words), (End::Client, Vec::new()));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_accepts_no_more_is_read_to_its_end() {
    let mut session = Session::begin();
    session.breaks.server.refuse_writes();
    session.client.write_all(&query()).await.unwrap();
    session.reply(&fatal()).await;
    session.server.shutdown().await.unwrap();
    let (end, words) = session.until_end().await;
    assert_eq!((end, words), (End::Server, Vec::new()));
}

#[tokio::test(start_paused = true)]
async fn the_loss_of_a_server_that_accepts_no_more_and_sends_no_error_is_explained() {
    for reset in [true, false] {
        let mut session = Session::begin();
        session.breaks.server.refuse_writes();
        if reset {
            session.breaks.server.reset();
        }
        let began = Instant::now();
        session.client.write_all(&query()).await.unwrap();
        let (end, words) = session.until_end().await;
        assert_eq!(end, End::Server);
        assert_eq!(errors(&words), ["08006"]);
        let waited = if reset {
            Duration::ZERO
        } else {
            SERVER_CLOSE_TIMEOUT
        };
        assert_eq!(began.elapsed().as_secs(), waited.as_secs());
    }
}

// Our own end.

const ORDERLY: End = End::Shutdown { orderly: true };

#[tokio::test(start_paused = true)]
async fn draining_ends_an_idle_session_at_once() {
    let mut session = Session::begin();
    session.query().await;
    session.reply(&ready(b'I')).await;
    let began = Instant::now();
    session.shutdown.drain();
    let (end, words) = session.until_end().await;
    assert_eq!((end, began.elapsed()), (ORDERLY, Duration::ZERO));
    assert_eq!(errors(&words), ["57P01"]);
}

#[tokio::test(start_paused = true)]
async fn draining_lets_a_transaction_finish() {
    let mut session = Session::begin();
    session.query().await;
    session.shutdown.drain();
    session.reply(&ready(b'T')).await;
    assert!(session.is_waiting().await, "in a transaction");
    session.query().await;
    session.reply(&frame(b'C', b"COMMIT\0")).await;
    assert!(session.is_waiting().await, "the answer is not complete");
    session.server.write_all(&ready(b'I')).await.unwrap();
    let (end, words) = session.until_end().await;
    assert_eq!(end, ORDERLY);
    assert!(words.starts_with(&ready(b'I')));
    assert_eq!(errors(&words), ["57P01"]);
}

#[tokio::test(start_paused = true)]
async fn draining_waits_for_the_end_of_a_request() {
    let mut session = Session::begin();
    session.client.write_all(&query()[..3]).await.unwrap();
    session.server.read_exact(&mut [0; 3]).await.unwrap();
    session.shutdown.drain();
    assert!(session.is_waiting().await, "half a query was sent");
    session.client.write_all(&query()[3..]).await.unwrap();
    assert!(session.is_waiting().await, "a query was sent");
    session.server.write_all(&ready(b'I')).await.unwrap();
    assert_eq!(session.ended().await, ORDERLY);
}

/// The server discards the query behind extended messages of which one has failed, up to the Sync.
#[tokio::test(start_paused = true)]
async fn draining_does_not_wait_for_a_query_that_the_server_discards() {
    for with_sync in [false, true] {
        let mut session = Session::begin();
        let mut request = [frame(b'P', b"\0\0\0\0"), query()].concat();
        let mut reply = frame(b'E', b"SERROR\0\0");
        if with_sync {
            request.extend(frame(b'S', b""));
            reply.extend(ready(b'I'));
        }
        session.client.write_all(&request).await.unwrap();
        let mut received = vec![0; request.len()];
        session.server.read_exact(&mut received).await.unwrap();
        session.shutdown.drain();
        assert!(session.is_waiting().await, "not failed yet");
        session.server.write_all(&reply).await.unwrap();
        let (end, words) = session.until_end().await;
        assert_eq!(end, ORDERLY);
        assert!(words.starts_with(&reply));
    }
}

#[tokio::test(start_paused = true)]
async fn draining_adds_nothing_behind_an_error_of_the_server() {
    let mut session = Session::begin();
    session.reply(&fatal()).await;
    session.shutdown.drain();
    let (_, words) = session.until_end().await;
    assert!(words.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_cut_ends_every_session_between_two_messages() {
    let mut session = Session::begin();
    session.query().await;
    session.reply(&frame(b'D', b"row")).await;
    session.shutdown.drain();
    assert!(session.is_waiting().await);
    session.shutdown.cut();
    let (end, words) = session.until_end().await;
    assert_eq!(end, ORDERLY);
    assert_eq!(errors(&words), ["57P01"]);
}

#[tokio::test(start_paused = true)]
async fn the_cut_sends_nothing_inside_a_message_to_either_side() {
    let mut session = Session::begin();
    session.query().await;
    session.reply(&frame(b'D', b"row")[..6]).await;
    session.client.write_all(&query()[..6]).await.unwrap();
    session.server.read_exact(&mut [0; 6]).await.unwrap();
    session.shutdown.cut();
    let (end, words) = session.until_end().await;
    assert_eq!(
        end,
        End::Shutdown { orderly: false },
        "no Terminate inside a query"
    );
    assert!(words.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_cut_waits_for_no_client_that_does_not_read() {
    // One that has not read that its server is gone, and one whose server still sends.
    for gone in [true, false] {
        let mut session = Session::with((16, ROOM), b"", b"");
        let reply = frame(b'D', &[0; 11]);
        session.server.write_all(&reply).await.unwrap();
        if gone {
            session.server.shutdown().await.unwrap();
        } else {
            session.server.write_all(&reply).await.unwrap();
        }
        let waited = timeout(Duration::from_secs(10), session.relay.join_next()).await;
        assert!(waited.is_err());
        let began = Instant::now();
        session.shutdown.cut();
        session.relay.join_next().await.unwrap().unwrap();
        assert_eq!(began.elapsed().as_secs(), CUT_DELIVERY_TIMEOUT.as_secs());
    }
}

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// The phase and its token do not change in one step. Whatever a session sees of them, in whichever order, the next
/// change must wake it, and none may be looked at twice.
#[tokio::test]
async fn no_change_of_phase_is_missed() {
    use Phase::{Cutting, Draining, Serving};
    enum Step {
        Drain,
        Cut,
        Look(Phase, Phase),
        Woken,
    }
    use Step::{Cut, Drain, Look, Woken};
    let stories: Vec<Vec<Step>> = vec![
        vec![
            Look(Serving, Serving),
            Drain,
            Woken,
            Look(Draining, Draining),
            Cut,
            Woken,
            Look(Cutting, Cutting),
        ],
        // The phase is seen before its token has changed.
        vec![
            Look(Draining, Draining),
            Drain,
            Woken,
            Look(Draining, Draining),
            Cut,
            Woken,
            Look(Cutting, Cutting),
        ],
        // The phase changes right after it was looked at.
        vec![
            Drain,
            Look(Serving, Draining),
            Cut,
            Woken,
            Look(Cutting, Cutting),
        ],
        vec![
            Drain,
            Cut,
            Look(Serving, Cutting),
            Look(Cutting, Cutting),
            Look(Cutting, Cutting),
        ],
        vec![
            Look(Serving, Serving),
            Drain,
            Cut,
            Woken,
            Look(Draining, Cutting),
            Look(Cutting, Cutting),
        ],
        vec![
            Look(Cutting, Cutting),
            Drain,
            Woken,
            Look(Cutting, Cutting),
            Cut,
            Woken,
            Look(Cutting, Cutting),
        ],
    ];
    for (number, story) in stories.into_iter().enumerate() {
        let (drain, cut) = (CancellationToken::new(), CancellationToken::new());
        let mut next = pin!(drain.cancelled());
        let mut reached = None;
        let woken = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        for step in story {
            match step {
                Drain => drain.cancel(),
                Cut => cut.cancel(),
                Look(now, expected) => {
                    let phase = poll_phase(&mut cx, now, &mut reached, next.as_mut(), &cut);
                    assert_eq!(phase, expected, "story {number}");
                }
                Woken => assert!(woken.0.swap(0, Ordering::SeqCst) > 0, "story {number}"),
            }
        }
    }
}

/// Linux would end a server that waits for a lock in the middle of a COPY, alive as it is, when the limit is over.
#[test]
fn the_loss_timeout_is_in_force_only_while_few_bytes_await_an_answer() {
    let timeout = Some(Duration::from_secs(80));
    let mut loss = PathLoss {
        timeout,
        ..PathLoss::default()
    };
    assert!(!loss.update(1000, true), "in force since the dial");
    assert!(!loss.update(1000, false));
    assert!(!loss.update(1000 + PathLoss::MAX_UNANSWERED, true));
    assert!(loss.update(1001 + PathLoss::MAX_UNANSWERED, true));
    assert_eq!(loss.timeout_in_force(), None);
    assert!(!loss.update(1_000_000, true));
    assert!(loss.update(1_000_000, false));
    assert_eq!(loss.timeout_in_force(), timeout);
}

/// What it has sent on earlier ones has been answered there.
#[tokio::test]
async fn a_session_on_another_server_connection_waits_for_what_it_has_sent_there() {
    let (_client, mut our_client) = duplex(ROOM);
    let (_server, mut our_server) = duplex(ROOM);
    let (shutdown, metrics) = (Shutdown::new(), Metrics::new().unwrap());
    let activity = ActivityRecord::new(Instant::now());
    let large = frame(b'Q', &vec![b' '; 17 * 1024]);
    for (request, is_in_force) in [(&query(), true), (&large, false), (&query(), true)] {
        let mut relay = Relay::new(
            side(&mut our_client, request[..].into()),
            side(&mut our_server, BytesMut::new()),
            &shutdown,
            Observers {
                loss_timeout: Some(Duration::from_secs(80)),
                ..observers(&activity, &metrics)
            },
        );
        let mut cx = Context::from_waker(Waker::noop());
        assert!(relay.poll(&mut cx, Phase::Serving, &mut None).is_pending());
        assert_eq!(relay.loss.timeout_in_force().is_some(), is_in_force);
    }
}

#[test]
fn the_server_error_is_a_fatal_error_at_the_end() {
    let error_of = |chunks: &[&[u8]]| {
        let mut kept = TrailingError::default();
        for chunk in chunks {
            kept.keep(chunk, true);
        }
        kept.fatal()
    };
    let fatal = fatal();
    let expected = Some(ErrorFields::parse(&fatal[5..]).message);
    assert_eq!(error_of(&[&fatal]), expected);
    assert_eq!(error_of(&[&[7; 3000], &fatal[..9], &fatal[9..]]), expected);
    let error = Report::new("42P01", "select secret").encode_error();
    assert_eq!(error_of(&[&error]), None);
    assert_eq!(error_of(&[b"x"]), None);
    let mut kept = TrailingError::default();
    kept.keep(&fatal, true);
    kept.keep(&ready(b'I'), false);
    assert_eq!(kept.fatal(), None);
}
