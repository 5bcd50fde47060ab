import java.sql.DriverManager;

/** The PostgreSQL JDBC driver with the URL of the first argument: prints 42, and keeps the connection until standard input ends. */
public class Jdbc {
    public static void main(String[] arguments) throws Exception {
        try (var connection = DriverManager.getConnection(arguments[0]); var rows = connection.createStatement().executeQuery("select 6 * 7")) {
            rows.next();
            System.out.println(rows.getInt(1));
            System.in.readAllBytes();
        }
    }
}
