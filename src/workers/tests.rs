//! Real sockets, on real relay threads.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use super::*;

/// More than any of these tests takes when all is well.
const LONG: Duration = Duration::from_secs(30);
const MEGABYTE: usize = 1 << 20;

async fn pair() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (ours, _) = listener.accept().await.unwrap();
    (theirs, ours.into())
}

/// Runs `job`, and says what came of it; nothing when it panicked.
fn run<J>(workers: &Workers, job: J) -> impl Future<Output = Option<J::Output>> + use<J>
where
    J: Future<Output: Send> + Send + 'static,
{
    let (tell, told) = oneshot::channel();
    workers.spawn(Box::pin(async move {
        let _ = tell.send(job.await);
    }));
    async { timeout(LONG, told).await.unwrap().ok() }
}

/// Sends back what comes, until nothing comes.
async fn echo(mut socket: Socket) -> io::Result<usize> {
    socket.settle()?;
    let mut buffer = vec![0; 10_000];
    let mut total = 0;
    loop {
        let read = socket.read(&mut buffer).await?;
        if read == 0 {
            socket.shutdown().await?;
            return Ok(total);
        }
        socket.write_all(&buffer[..read]).await?;
        total += read;
    }
}

#[tokio::test]
async fn what_is_sent_at_any_time_arrives_and_so_does_the_end() {
    let workers = Workers::start().unwrap();
    let (theirs, ours) = pair().await;
    let (mut reading, mut writing) = theirs.into_split();
    // Before it settles, while it runs, and more than fits into any buffer.
    writing.write_all(b"early").await.unwrap();
    let writes = async {
        for _ in 0..64 {
            writing.write_all(&vec![7; MEGABYTE]).await.unwrap();
        }
        writing.shutdown().await.unwrap();
    };
    let mut heard = Vec::new();
    let (echoed, (), _) = tokio::join!(run(&workers, echo(ours)), writes, async {
        reading.read_to_end(&mut heard).await.unwrap()
    });
    assert_eq!(echoed.unwrap().unwrap(), 5 + 64 * MEGABYTE);
    assert_eq!(heard.len(), 5 + 64 * MEGABYTE);
    assert!(heard.starts_with(b"early\x07"));
}

#[tokio::test]
async fn the_last_words_and_the_end_may_come_at_once() {
    let workers = Workers::start().unwrap();
    for _ in 0..200 {
        let (mut theirs, ours) = pair().await;
        theirs.write_all(b"bye").await.unwrap();
        theirs.shutdown().await.unwrap();
        assert_eq!(run(&workers, echo(ours)).await.unwrap().unwrap(), 3);
    }
}

#[tokio::test]
async fn a_unix_socket_settles_too() {
    let workers = Workers::start().unwrap();
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.write_all(b"hello").await.unwrap();
    theirs.shutdown().await.unwrap();
    let echoed = run(&workers, echo(ours.into()));
    let mut heard = Vec::new();
    let (echoed, _) = tokio::join!(echoed, theirs.read_to_end(&mut heard));
    assert_eq!((echoed.unwrap().unwrap(), heard), (5, b"hello".to_vec()));
}

#[tokio::test]
async fn a_reset_is_an_error() {
    let workers = Workers::start().unwrap();
    let (theirs, ours) = pair().await;
    socket2::SockRef::from(&theirs)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    let (echoed, ()) = tokio::join!(run(&workers, echo(ours)), async { drop(theirs) });
    assert_eq!(
        echoed.unwrap().unwrap_err().kind(),
        io::ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn timers_and_channels_work_there() {
    let workers = Workers::start().unwrap();
    let (say, mut hear) = mpsc::channel::<u32>(1);
    let job = run(&workers, async move {
        sleep(Duration::from_millis(1)).await;
        hear.recv().await
    });
    let (heard, ()) = tokio::join!(job, async { say.send(7).await.unwrap() });
    assert_eq!(heard.unwrap(), Some(7));
}

/// The last of it is no batch, and neither is what is said afterwards.
#[tokio::test]
async fn nothing_of_a_bulk_transfer_is_kept_back() {
    let workers = Workers::start().unwrap();
    let (mut theirs, mut ours) = pair().await;
    let (told, mut tell) = mpsc::channel(1);
    let reading = run(&workers, async move {
        ours.settle().unwrap();
        let mut buffer = vec![0; 64 * 1024];
        for _ in 0..3 {
            let mut total = 0;
            while total < 10 * MEGABYTE + 1 {
                total += ours.read(&mut buffer).await.unwrap();
            }
            told.send(total).await.unwrap();
        }
        ours.read_u8().await.unwrap()
    });
    let sending = async {
        for _ in 0..3 {
            for _ in 0..10 {
                theirs.write_all(&vec![7; MEGABYTE]).await.unwrap();
            }
            theirs.write_all(&[7]).await.unwrap();
            assert_eq!(tell.recv().await, Some(10 * MEGABYTE + 1));
        }
        theirs.write_all(&[8]).await.unwrap();
    };
    let (last, ()) = timeout(LONG, async { tokio::join!(reading, sending) })
        .await
        .unwrap();
    assert_eq!(last, Some(8));
}

/// One that never has to wait for its peer gives way to the others all the same.
#[tokio::test]
async fn a_bulk_transfer_lets_others_in() {
    let workers = Workers::start().unwrap();
    assert_eq!(workers.0.len(), 1, "of one thread, as its runtime is");
    let (theirs, mut ours) = pair().await;
    let (stop, mut stopped) = oneshot::channel::<()>();
    let bulk = run(&workers, async move {
        ours.settle().unwrap();
        let mut written: usize = 0;
        while stopped.try_recv().is_err() {
            written += ours.write(&[0; 16]).await.unwrap();
        }
        written
    });
    let reader = thread::spawn({
        let theirs = theirs_as_std(&theirs);
        move || io::copy(&mut &theirs, &mut io::sink()).unwrap()
    });
    let (written, ()) = tokio::join!(bulk, async {
        for _ in 0..100 {
            assert_eq!(run(&workers, async { 1 }).await, Some(1));
        }
        stop.send(()).unwrap();
    });
    drop(theirs);
    let read = tokio::task::spawn_blocking(|| reader.join().unwrap());
    assert_eq!(read.await.unwrap(), written.unwrap() as u64);
}

/// The same socket, for a thread that blocks.
fn theirs_as_std(theirs: &TcpStream) -> std::net::TcpStream {
    let other = socket2::SockRef::from(theirs).try_clone().unwrap();
    other.set_nonblocking(false).unwrap();
    other.into()
}

#[tokio::test]
async fn a_panic_ends_one_job_alone() {
    let workers = Workers::start().unwrap();
    let (mut theirs, ours) = pair().await;
    let echoing = run(&workers, echo(ours));
    let panicked: Option<()> = run(&workers, async { panic!("on purpose") }).await;
    assert_eq!(panicked, None);
    let (echoed, ()) = tokio::join!(echoing, async {
        theirs.write_all(b"still here").await.unwrap();
        theirs.shutdown().await.unwrap();
    });
    assert_eq!(echoed.unwrap().unwrap(), 10);
    let none_left = async {
        while workers.0[0].jobs() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, none_left).await.unwrap();
}

#[tokio::test]
async fn what_still_runs_at_the_end_is_dropped() {
    let workers = Workers::start().unwrap();
    let (mut theirs, ours) = pair().await;
    let echoing = run(&workers, echo(ours));
    let ended = async {
        theirs.write_all(b"x").await.unwrap();
        theirs.read_u8().await.unwrap();
        drop(workers);
        theirs.read(&mut [0; 1]).await.unwrap_or(0)
    };
    let (echoed, read) = tokio::join!(echoing, timeout(LONG, ended));
    assert!(echoed.is_none());
    assert_eq!(read.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn jobs_go_where_the_fewest_are() {
    let workers = Workers::start().unwrap();
    let (waiters, mut gone) = mpsc::channel::<()>(1);
    for _ in 0..9 {
        let waiter = waiters.clone();
        workers.spawn(Box::pin(async move {
            waiter.closed().await;
        }));
    }
    let shares: Vec<_> = workers.0.iter().map(|inbox| inbox.jobs()).collect();
    assert_eq!(shares, [3, 3, 3]);
    workers.all_respond().await;
    gone.close();
}

#[tokio::test]
async fn a_socket_settles_nowhere_else() {
    let (_theirs, mut ours) = pair().await;
    assert!(ours.settle().is_err(), "this is no relay thread");
    assert_eq!(
        ours.read(&mut [0; 1]).await.unwrap_err().kind(),
        io::ErrorKind::NotConnected
    );
}

/// A thread that had ended had the fewest jobs, and so was given all that came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_that_has_ended_is_given_nothing() {
    let workers = Workers::start().unwrap();
    assert_eq!(workers.0.len(), 2);
    workers.0[0].stop();
    while !workers.0[0].is_closed() {
        tokio::task::yield_now().await;
    }
    for _ in 0..4 {
        let (done, is_done) = oneshot::channel();
        workers.spawn(Box::pin(async move {
            let _ = done.send(());
        }));
        is_done.await.unwrap();
    }
    workers.all_respond().await;
}
