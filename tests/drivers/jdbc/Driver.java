import java.io.ByteArrayOutputStream;
import java.io.StringReader;
import java.sql.BatchUpdateException;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.SQLWarning;
import java.sql.Statement;
import java.sql.Types;
import java.time.LocalDate;
import java.time.OffsetDateTime;
import java.time.ZoneOffset;
import java.util.Arrays;
import java.util.Properties;
import java.util.TreeMap;
import java.util.concurrent.Executors;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.util.PSQLException;
import org.postgresql.util.ServerErrorMessage;

/**
 * The PostgreSQL JDBC driver: one broad job over one server, reported as `key = value` lines.
 *
 * <p>The server is named by libpq's own variables alone (the driver does not read them, so this does), and the same
 * program runs direct and through the proxy.
 */
public class Driver {
    /** Seconds that anything here may take before it counts as hung. */
    private static final int WAIT = 20;

    private interface Job {
        void on(Connection connection) throws Exception;
    }

    private static void report(String key, Object value) {
        System.out.println(key + " = " + value);
    }

    /** The number of a backend's temporary schema may differ. */
    private static String settled(String text) {
        return text.replaceAll("pg_temp_\\d+", "pg_temp_N");
    }

    private static void failure(String key, SQLException error) {
        report(key + ".sqlstate", error.getSQLState());
        ServerErrorMessage server = error instanceof PSQLException ? ((PSQLException) error).getServerErrorMessage() : null;
        if (server == null) {
            return;
        }
        report(key + ".severity", server.getSeverity());
        report(key + ".message", settled(server.getMessage()));
        report(key + ".detail", server.getDetail());
        report(key + ".hint", server.getHint());
        report(key + ".position", server.getPosition());
        report(key + ".where", server.getWhere());
        report(key + ".table", server.getTable());
        report(key + ".column", server.getColumn());
        report(key + ".constraint", server.getConstraint());
        report(key + ".routine", server.getRoutine());
    }

    private static String environment(String name, String otherwise) {
        String value = System.getenv(name);
        return value == null || value.isEmpty() ? otherwise : value;
    }

    private static Connection connect(String... more) throws SQLException {
        Properties properties = new Properties();
        String user = environment("PGUSER", "anyone");
        properties.setProperty("user", user);
        // The driver's default: `prefer`, so an SSLRequest is sent and may be answered `N`.
        properties.setProperty("sslmode", environment("PGSSLMODE", "prefer"));
        if (System.getenv("PGSSLROOTCERT") != null) {
            properties.setProperty("sslrootcert", System.getenv("PGSSLROOTCERT"));
        }
        if (System.getenv("PGPASSWORD") != null) {
            properties.setProperty("password", System.getenv("PGPASSWORD"));
        }
        properties.setProperty("loginTimeout", String.valueOf(WAIT));
        String database = environment("PGDATABASE", user);
        for (int i = 0; i < more.length; i += 2) {
            if (more[i].equals("database")) {
                database = more[i + 1];
            } else {
                properties.setProperty(more[i], more[i + 1]);
            }
        }
        return DriverManager.getConnection("jdbc:postgresql://" + environment("PGHOST", "localhost") + ":" + environment("PGPORT", "5432") + "/" + database, properties);
    }

    private static String one(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(sql)) {
            rows.next();
            return rows.getString(1);
        }
    }

    /** Which process serves it; what a driver knows as its process id may be half of a cancel key that the edge made up. */
    private static int backend(Connection connection) throws SQLException {
        return Integer.parseInt(one(connection, "select pg_backend_pid()"));
    }

    private static void run(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute(sql);
        }
    }

    private static void startup() throws Exception {
        String[] settings = {"application_name", "TimeZone", "DateStyle", "client_encoding", "search_path", "statement_timeout", "extra_float_digits", "default_transaction_read_only"};
        // The driver sends TimeZone, DateStyle, client_encoding and extra_float_digits as startup parameters by itself.
        try (Connection connection = connect("ApplicationName", "jdbc's job", "options", "-c statement_timeout=54321", "currentSchema", "public,pg_catalog", "readOnly", "true", "preferQueryMode", "simple")) {
            PGConnection postgres = connection.unwrap(PGConnection.class);
            report("startup.pid is pg_backend_pid", backend(connection) == postgres.getBackendPID());
            report("startup.server", connection.getMetaData().getDatabaseProductVersion());
            new TreeMap<>(postgres.getParameterStatuses()).forEach((name, value) -> report("startup.status." + name, value));
            for (String name : settings) {
                report("startup.show." + name, one(connection, "show " + name));
            }
            run(connection, "set application_name = 'changed'");
            run(connection, "reset all");
            for (String name : settings) {
                report("startup.after RESET ALL." + name, one(connection, "show " + name));
            }
            run(connection, "set timezone = 'Asia/Tokyo'");
            run(connection, "discard all");
            for (String name : settings) {
                report("startup.after DISCARD ALL." + name, one(connection, "show " + name));
            }
            report("startup.current", one(connection, "select (current_database(), current_user)::text"));
        }
        String[][] wrong = {{"startup.no such database", "database", "no_such_database"}, {"startup.bad option", "options", "-c no_such_setting=1"}};
        for (String[] one : wrong) {
            try (Connection connection = connect(one[1], one[2])) {
                report(one[0], "connected");
            } catch (SQLException error) {
                report(one[0], error.getSQLState());
            }
        }
    }

    private static void types(Connection connection) throws Exception {
        String sql = "select 42::int2, -7::int4, 9007199254740993::int8, 1.5::float4, 2.25::float8, 123456789.123456789::numeric, true, 'text'::text, 'x'::char(3),"
            + " '\\xdeadbeef'::bytea, date '2026-02-28', time '23:59:59', timestamp '2026-02-28 12:34:56.789', interval '1 day 02:03:04', '{\"a\": [1, null]}'::jsonb,"
            + " array[1, null, 3], array[['a', 'b'], ['c', 'd']], int4range(1, 5), 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid, 'infinity'::float8, null::int4, point(1, 2)";
        try (PreparedStatement statement = connection.prepareStatement(sql)) {
            // Past prepareThreshold the driver switches to a named statement and to binary results.
            for (int round = 0; round < 7; round++) {
                try (ResultSet row = statement.executeQuery()) {
                    row.next();
                    StringBuilder all = new StringBuilder();
                    for (int column = 1; column <= row.getMetaData().getColumnCount(); column++) {
                        Object value = row.getObject(column);
                        all.append(row.getMetaData().getColumnTypeName(column)).append(':').append(value instanceof byte[] ? Arrays.toString((byte[]) value) : value).append(' ');
                    }
                    report("types." + round, all);
                }
            }
        }
        try (PreparedStatement statement = connection.prepareStatement("select ?::int8, ?::bytea, ?::text, ?::int[], ?::text, ?::timestamptz, ?::date, ?::numeric")) {
            for (int round = 0; round < 7; round++) {
                statement.setLong(1, 1L << 40);
                statement.setBytes(2, new byte[] {0, 1, -1});
                statement.setString(3, "na\u00efve \u2013 \u6f22\u5b57 \ud83d\udc18");
                statement.setArray(4, connection.createArrayOf("int4", new Integer[] {1, null, 3}));
                statement.setNull(5, Types.VARCHAR);
                statement.setObject(6, OffsetDateTime.of(2026, 2, 28, 12, 0, 0, 0, ZoneOffset.UTC));
                statement.setObject(7, LocalDate.of(1, 1, 1));
                statement.setBigDecimal(8, new java.math.BigDecimal("1e-10"));
                try (ResultSet row = statement.executeQuery()) {
                    row.next();
                    report("types.round trip." + round, row.getLong(1) + " " + Arrays.toString(row.getBytes(2)) + " " + row.getString(3) + " " + row.getArray(4) + " " + row.getString(5)
                        + " " + row.getObject(6, OffsetDateTime.class).toInstant() + " " + row.getObject(7, LocalDate.class) + " " + row.getBigDecimal(8).toPlainString());
                }
            }
        }
    }

    private static void large(Connection connection) throws Exception {
        String text = "0123456789abcdef".repeat(1 << 20);
        try (PreparedStatement statement = connection.prepareStatement("select md5(?), repeat('0123456789abcdef', 1 << 20)")) {
            statement.setString(1, text);
            try (ResultSet row = statement.executeQuery()) {
                row.next();
                report("large", row.getString(1) + " " + row.getString(2).equals(text));
            }
        }
    }

    private static void batch(Connection connection) throws Exception {
        run(connection, "create temp table batched (n int primary key, t text)");
        try (PreparedStatement statement = connection.prepareStatement("insert into batched values (?, ?)", Statement.RETURN_GENERATED_KEYS)) {
            for (int n = 0; n < 3000; n++) {
                statement.setInt(1, n);
                statement.setString(2, "row " + n);
                statement.addBatch();
            }
            report("batch.counts", Arrays.stream(statement.executeBatch()).sum());
        }
        try (PreparedStatement statement = connection.prepareStatement("insert into batched values (?, 'x')")) {
            for (int n : new int[] {9000, 9001, 1, 9002}) {
                statement.setInt(1, n);
                statement.addBatch();
            }
            statement.executeBatch();
        } catch (BatchUpdateException error) {
            report("batch.error", error.getSQLState() + " " + Arrays.toString(error.getUpdateCounts()));
            failure("batch.error", (SQLException) error.getCause());
        }
        report("batch.left", one(connection, "select count(*) from batched"));
        try (Statement statement = connection.createStatement()) {
            statement.addBatch("delete from batched where n < 100");
            statement.addBatch("update batched set t = 'y' where n >= 2900");
            report("batch.statements", Arrays.toString(statement.executeBatch()));
        }
    }

    private static void errors(Connection connection) throws Exception {
        run(connection, "create temp table strict (id int primary key, positive int constraint must_be_positive check (positive > 0), label text not null)");
        String[][] statements = {
            {"unique", "insert into strict values (1, 1, 'a'), (1, 2, 'b')"},
            {"check", "insert into strict values (2, -1, 'a')"},
            {"not null", "insert into strict values (3, 1, null)"},
            {"syntax", "selec 1"},
            {"no table", "select * from no_such_table"},
            {"division", "select 1 / 0"},
            {"raised", "do $$ begin raise exception 'own words %', 7 using errcode = 'LB001', detail = 'a detail', hint = 'a hint'; end $$"},
            {"unicode", "do $$ begin raise exception '\u017c\u00f3\u0142\u0107 \ud83d\udc18'; end $$"},
        };
        for (String[] statement : statements) {
            try {
                run(connection, statement[1]);
            } catch (SQLException error) {
                failure("errors." + statement[0], error);
            }
        }
        connection.setAutoCommit(false);
        run(connection, "insert into strict values (1, 1, 'kept')");
        java.sql.Savepoint savepoint = connection.setSavepoint("inner_point");
        try {
            run(connection, "select 1 / 0");
        } catch (SQLException error) {
            report("errors.inside", error.getSQLState());
        }
        try {
            run(connection, "select 1");
        } catch (SQLException error) {
            report("errors.in failed transaction", error.getSQLState());
        }
        connection.rollback(savepoint);
        connection.commit();
        connection.setAutoCommit(true);
        report("errors.kept", one(connection, "select string_agg(label, ',') from strict"));
    }

    private static void copy(Connection connection) throws Exception {
        run(connection, "create temp table copied (id int, t text)");
        var manager = connection.unwrap(PGConnection.class).getCopyAPI();
        StringBuilder rows = new StringBuilder();
        for (int n = 0; n < 20000; n++) {
            rows.append(n).append("\trow ").append(n).append(" \u017c\u00f3\u0142\u0107\n");
        }
        report("copy.in", manager.copyIn("copy copied from stdin", new StringReader(rows.toString())));
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        report("copy.out", manager.copyOut("copy (select * from copied order by id) to stdout", out) + " " + out.size());
        report("copy.checksum", one(connection, "select md5(string_agg(t, ',' order by id)) from copied"));
        try {
            manager.copyIn("copy copied from stdin", new StringReader("not a number\tx\n"));
        } catch (SQLException error) {
            failure("copy.bad row", error);
        }
        var givenUp = manager.copyIn("copy copied from stdin");
        givenUp.writeToCopy("1\tx\n".getBytes(), 0, 4);
        givenUp.cancelCopy();
        try {
            manager.copyOut("copy (select 1 / (50000 - g) from generate_series(1, 60000) g) to stdout", new ByteArrayOutputStream());
        } catch (SQLException error) {
            report("copy.out fails midway", error.getSQLState());
        }
        report("copy.left", one(connection, "select count(*) from copied"));
    }

    private static void notifications() throws Exception {
        try (Connection listener = connect(); Connection speaker = connect()) {
            run(listener, "listen drivers_jdbc");
            run(speaker, "notify drivers_jdbc, 'one'");
            run(speaker, "select pg_notify('drivers_jdbc', 'two \ud83d\udc18')");
            int pid = backend(speaker);
            int received = 0;
            while (received < 2) {
                PGNotification[] some = listener.unwrap(PGConnection.class).getNotifications(WAIT * 1000);
                if (some == null || some.length == 0) {
                    break;
                }
                for (PGNotification one : some) {
                    report("notify." + received++, one.getName() + " " + one.getParameter() + " " + (one.getPID() == pid));
                }
            }
        }
    }

    private static void notices(Connection connection) throws Exception {
        try (Statement statement = connection.createStatement()) {
            statement.execute("do $$ begin raise notice 'first'; raise warning 'second' using hint = 'h'; raise notice '%', repeat('x', 70000); end $$");
            for (SQLWarning warning = statement.getWarnings(); warning != null; warning = warning.getNextWarning()) {
                String text = warning.getMessage();
                report("notices", warning.getSQLState() + " " + text.substring(0, Math.min(20, text.length())) + " " + text.length());
            }
        }
    }

    /** The process that sleeps: a pool may run each transaction at another one. */
    private static int asleep() throws Exception {
        long end = System.nanoTime() + WAIT * 1_000_000_000L;
        try (Connection watcher = connect()) {
            while (System.nanoTime() < end) {
                String pid = one(watcher, "select max(pid) from pg_stat_activity where state = 'active' and wait_event = 'PgSleep'");
                if (pid != null) {
                    return Integer.parseInt(pid);
                }
                Thread.sleep(20);
            }
        }
        throw new IllegalStateException("no backend began to sleep");
    }

    private static void cancel(Connection connection) throws Exception {
        long began = System.nanoTime();
        var worker = Executors.newSingleThreadExecutor();
        try (Statement statement = connection.createStatement()) {
            var striker = worker.submit(() -> {
                asleep();
                statement.cancel();
                return null;
            });
            try {
                statement.execute("select pg_sleep(60)");
            } catch (SQLException error) {
                failure("cancel", error);
            }
            striker.get();
        }
        worker.shutdown();
        try (Statement statement = connection.createStatement()) {
            statement.setQueryTimeout(1);
            statement.execute("select pg_sleep(60)");
        } catch (SQLException error) {
            report("cancel.query timeout", error.getSQLState());
        }
        report("cancel.prompt", System.nanoTime() - began < WAIT * 1_000_000_000L);
        report("cancel.usable", one(connection, "select 1"));
    }

    private static void cursors(Connection connection) throws Exception {
        connection.setAutoCommit(false);
        try (Statement statement = connection.createStatement()) {
            statement.setFetchSize(700);
            try (ResultSet rows = statement.executeQuery("select g from generate_series(1, 10000) g")) {
                long sum = 0;
                while (rows.next()) {
                    sum += rows.getInt(1);
                }
                report("cursors.sum", sum);
            }
        }
        try (Statement statement = connection.createStatement(ResultSet.TYPE_SCROLL_INSENSITIVE, ResultSet.CONCUR_READ_ONLY); ResultSet rows = statement.executeQuery("select generate_series(1, 100)")) {
            rows.absolute(50);
            rows.relative(-10);
            report("cursors.scrolled", rows.getInt(1));
        }
        connection.commit();
        connection.setAutoCommit(true);
    }

    private static void results(Connection connection) throws Exception {
        try (Statement statement = connection.createStatement()) {
            boolean rows = statement.execute("select 1; select 'two', 2; create temp table third (n int); insert into third select generate_series(1, 5); select count(*) from third");
            while (rows || statement.getUpdateCount() != -1) {
                if (rows) {
                    ResultSet set = statement.getResultSet();
                    set.next();
                    report("results.rows", set.getString(1));
                } else {
                    report("results.count", statement.getUpdateCount());
                }
                rows = statement.getMoreResults();
            }
        }
        try {
            run(connection, "insert into third values (6); select 1 / 0; select 3");
        } catch (SQLException error) {
            report("results.error", error.getSQLState());
        }
        report("results.undone", one(connection, "select count(*) from third"));
        try (var call = connection.prepareCall("{? = call upper(?)}")) {
            call.registerOutParameter(1, Types.VARCHAR);
            call.setString(2, "abc");
            call.execute();
            report("results.called", call.getString(1));
        }
        // The function call protocol, which the driver still speaks for large objects.
        connection.setAutoCommit(false);
        var objects = connection.unwrap(PGConnection.class).getLargeObjectAPI();
        long id = objects.createLO();
        try (var object = objects.open(id)) {
            object.write(new byte[200_000]);
            object.seek(100_000);
            report("results.large object", object.size() + " " + object.read(200_000).length);
        }
        objects.delete(id);
        connection.commit();
        connection.setAutoCommit(true);
    }

    /** The client receives the server's own error when its backend is terminated. */
    private static void ended() throws Exception {
        try (Connection victim = connect(); Connection killer = connect()) {
            var worker = Executors.newSingleThreadExecutor();
            var striker = worker.submit(() -> {
                run(killer, "select pg_terminate_backend(" + asleep() + ")");
                return null;
            });
            try {
                run(victim, "select pg_sleep(60)");
            } catch (SQLException error) {
                failure("ended", error);
            }
            striker.get();
            worker.shutdown();
        }
    }

    public static void main(String[] arguments) throws Exception {
        java.util.TimeZone.setDefault(java.util.TimeZone.getTimeZone("Pacific/Auckland"));
        java.util.Locale.setDefault(java.util.Locale.ROOT);
        System.setOut(new java.io.PrintStream(new java.io.FileOutputStream(java.io.FileDescriptor.out), true, "UTF-8"));
        startup();
        Job[] sections = {Driver::types, Driver::large, Driver::batch, Driver::errors, Driver::copy, Driver::notices, Driver::cancel, Driver::cursors, Driver::results};
        try (Connection connection = connect()) {
            for (Job section : sections) {
                section.on(connection);
            }
        }
        notifications();
        ended();
        report("end", "of the job");
    }
}
