// lib/pq with the connection string of the first argument: prints 42, and keeps the connection until standard input ends.
package main

import (
	"database/sql"
	"fmt"
	"io"
	"os"

	_ "github.com/lib/pq"
)

func main() {
	db, err := sql.Open("postgres", os.Args[1])
	if err != nil {
		panic(err)
	}
	db.SetMaxOpenConns(1)
	var answer int
	if err := db.QueryRow("select 6 * 7").Scan(&answer); err != nil {
		panic(err)
	}
	fmt.Println(answer)
	io.Copy(io.Discard, os.Stdin)
}
