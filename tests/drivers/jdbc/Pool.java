import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Set;
import java.util.concurrent.Callable;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import org.postgresql.PGConnection;

/** HikariCP: ten connections of a pool that stay open while the compute suspends, and requests that work after that. */
public class Pool {
    private static final int SIZE = 10;
    private static final int ROUNDS = 5;
    /** Seconds that anything here may take before it counts as hung. */
    private static final int WAIT = 30;

    private static final HttpClient http = HttpClient.newHttpClient();

    /** Suspends the compute, and waits until the proxy knows that its connections are gone. */
    private static void suspend() throws Exception {
        // A login that is under way would wake it.
        untilNone("{state=\"opening\"");
        URI events = URI.create(System.getenv("EMULATOR_URL") + "/emulator/events");
        HttpRequest event = HttpRequest.newBuilder(events).POST(HttpRequest.BodyPublishers.ofString("{\"event\":\"suspend\"}")).build();
        check(http.send(event, HttpResponse.BodyHandlers.discarding()).statusCode() == 204, "suspend");
        untilNone("{");
    }

    private static void untilNone(String labels) throws Exception {
        HttpRequest look = HttpRequest.newBuilder(URI.create(System.getenv("METRICS_URL"))).build();
        for (long deadline = System.nanoTime() + TimeUnit.SECONDS.toNanos(WAIT);; Thread.sleep(50)) {
            String metrics = http.send(look, HttpResponse.BodyHandlers.ofString()).body();
            String prefix = "lakebase_proxy_pool_servers" + labels;
            if (metrics.lines().noneMatch(line -> line.startsWith(prefix) && !line.endsWith(" 0"))) {
                return;
            }
            check(System.nanoTime() < deadline, metrics);
        }
    }

    private static void work(Connection connection, int number) throws Exception {
        // From the fifth time on a prepared statement.
        for (int turn = 0; turn < 8; turn++) {
            try (PreparedStatement sum = connection.prepareStatement("select ?::int + ?")) {
                sum.setInt(1, number);
                sum.setInt(2, turn);
                try (ResultSet rows = sum.executeQuery()) {
                    check(rows.next() && rows.getInt(1) == number + turn, "sum");
                }
            }
        }
        try (PreparedStatement insert = connection.prepareStatement("insert into pool_rows values (?)")) {
            insert.setInt(1, number);
            insert.executeUpdate();
        }
    }

    private static void check(boolean holds, String what) {
        if (!holds) {
            throw new AssertionError(what);
        }
    }

    public static void main(String[] arguments) throws Exception {
        HikariConfig config = new HikariConfig();
        config.setJdbcUrl("jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/databricks_postgres?user=" + System.getenv("PGUSER"));
        config.setMaximumPoolSize(SIZE);
        config.setConnectionTimeout(TimeUnit.SECONDS.toMillis(WAIT));
        Set<PGConnection> used = Collections.newSetFromMap(new ConcurrentHashMap<>());
        ExecutorService threads = Executors.newFixedThreadPool(SIZE);
        try (HikariDataSource pool = new HikariDataSource(config)) {
            try (Connection connection = pool.getConnection(); Statement statement = connection.createStatement()) {
                statement.execute("drop table if exists pool_rows; create table pool_rows (a int)");
            }
            for (int round = 0; round < ROUNDS; round++) {
                if (round > 0) {
                    suspend();
                }
                // All ten at a time, so that each is used in each round.
                CyclicBarrier all = new CyclicBarrier(SIZE);
                List<Callable<Void>> tasks = new ArrayList<>();
                for (int task = 0; task < SIZE; task++) {
                    int number = task;
                    tasks.add(() -> {
                        try (Connection connection = pool.getConnection()) {
                            used.add(connection.unwrap(PGConnection.class));
                            all.await(WAIT, TimeUnit.SECONDS);
                            work(connection, number);
                        }
                        return null;
                    });
                }
                for (Future<Void> done : threads.invokeAll(tasks)) {
                    done.get();
                }
            }
            try (Connection connection = pool.getConnection(); Statement statement = connection.createStatement()) {
                try (ResultSet rows = statement.executeQuery("select count(*) from pool_rows")) {
                    check(rows.next() && rows.getInt(1) == SIZE * ROUNDS, "rows");
                }
                statement.execute("drop table pool_rows");
            }
            // None was replaced.
            check(used.size() == SIZE, used.size() + " connections");
        } finally {
            threads.shutdown();
        }
        System.out.println("end = of the job");
    }
}
