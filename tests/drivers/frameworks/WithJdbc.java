import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/** pgjdbc: a connection for each thread, or ({@code hikari}) HikariCP's pool; each statement is prepared at once. */
public class WithJdbc {
    private static final int WORKERS = 3;
    private static final int ROUNDS = 50;
    private static final int PAUSE = 20;

    private static String schema;

    public static void main(String[] arguments) throws Exception {
        boolean pools = arguments.length > 0;
        schema = pools ? "of_hikari" : "of_pgjdbc";
        String url = "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE")
                + "?user=" + System.getenv("PGUSER") + "&sslmode=disable&prepareThreshold=1&assumeMinServerVersion=15";
        try (Connection c = DriverManager.getConnection(url); Statement s = c.createStatement()) {
            s.execute("drop schema if exists " + schema + " cascade");
            s.execute("create schema " + schema + " create table item (worker int, round int, note text, unique (worker, round))");
        }
        HikariDataSource pool = pools ? pool(url) : null;
        long end = System.nanoTime() + (long) (Double.parseDouble(System.getenv("ROUNDS_SECONDS")) * 1e9);
        List<Callable<Integer>> workers = new ArrayList<>();
        for (int number = 0; number < WORKERS; number++) {
            int worker = number;
            workers.add(() -> {
                int done = 0;
                try (Connection own = pools ? null : DriverManager.getConnection(url)) {
                    for (; System.nanoTime() < end; done++) {
                        if (pools) {
                            try (Connection c = pool.getConnection()) {
                                round(c, worker, done % ROUNDS);
                            }
                        } else {
                            round(own, worker, done % ROUNDS);
                        }
                        Thread.sleep(PAUSE);
                    }
                }
                return done;
            });
        }
        ExecutorService threads = Executors.newFixedThreadPool(WORKERS);
        try {
            int sum = 0;
            for (Future<Integer> done : threads.invokeAll(workers)) {
                sum += done.get();
            }
            System.out.println(sum);
        } finally {
            threads.shutdown();
            if (pools) {
                pool.close();
            }
        }
    }

    private static HikariDataSource pool(String url) {
        HikariConfig config = new HikariConfig();
        config.setJdbcUrl(url);
        config.setMaximumPoolSize(WORKERS);
        config.setConnectionTimeout(60_000);
        return new HikariDataSource(config);
    }

    private static void round(Connection c, int worker, int round) throws SQLException {
        Map<String, String> settings = new LinkedHashMap<>();
        settings.put("search_path", schema);
        settings.put("timezone", "Etc/GMT+" + worker);
        settings.put("statement_timeout", 30 + worker + "s");
        settings.put("app.tenant", schema + " " + worker);
        c.setAutoCommit(true);
        try (Statement s = c.createStatement()) {
            for (Map.Entry<String, String> it : settings.entrySet()) {
                s.execute("set " + it.getKey() + " = '" + it.getValue() + "'");
            }
        }
        for (Map.Entry<String, String> it : settings.entrySet()) {
            equal(it.getKey(), list(c, "select current_setting(?)", it.getKey()), List.of(it.getValue()));
        }
        if (round == 0) {
            update(c, "delete from item where worker = ?", worker);
        }
        c.setAutoCommit(false);
        update(c, "insert into item values (?, ?, ?)", worker, round, note(worker, round));
        Savepoint once = c.setSavepoint();
        try {
            update(c, "insert into item values (?, ?, ?)", worker, round, "twice");
            throw new AssertionError("a key is not unique");
        } catch (SQLException error) {
            equal("state", error.getSQLState(), "23505");
        }
        c.rollback(once);
        equal("rows", list(c, "select count(*) || ' ' || sum(round) from item where worker = ?", worker), List.of(round + 1 + " " + round * (round + 1) / 2));
        c.commit();
        update(c, "set local statement_timeout = '77s'");
        update(c, "update item set note = 'undone' where worker = ?", worker);
        c.rollback();
        equal("timeout", list(c, "show statement_timeout"), List.of(settings.get("statement_timeout")));
        List<String> notes = new ArrayList<>();
        for (int it = 0; it <= round; it++) {
            notes.add(note(worker, it));
        }
        equal("notes", list(c, "select note from item where worker = ? order by round", worker), notes);
        c.commit();
    }

    private static String note(int worker, int round) {
        return schema + " " + worker + " " + round;
    }

    private static PreparedStatement bind(PreparedStatement statement, Object[] values) throws SQLException {
        for (int at = 0; at < values.length; at++) {
            statement.setObject(at + 1, values[at]);
        }
        return statement;
    }

    private static void update(Connection c, String sql, Object... values) throws SQLException {
        try (PreparedStatement statement = c.prepareStatement(sql)) {
            bind(statement, values).executeUpdate();
        }
    }

    private static List<String> list(Connection c, String sql, Object... values) throws SQLException {
        List<String> found = new ArrayList<>();
        try (PreparedStatement statement = c.prepareStatement(sql)) {
            // By portals, a few rows at a time, in a transaction.
            statement.setFetchSize(20);
            try (ResultSet rows = bind(statement, values).executeQuery()) {
                while (rows.next()) {
                    found.add(rows.getString(1));
                }
            }
        }
        return found;
    }

    private static void equal(String what, Object found, Object expected) {
        if (!Objects.equals(found, expected)) {
            throw new AssertionError(schema + ": " + what + ": " + found + " instead of " + expected);
        }
    }
}
