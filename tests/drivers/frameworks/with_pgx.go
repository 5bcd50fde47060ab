// pgx: its pool, which prepares each statement.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

const (
	schema  = "of_pgx"
	workers = 3
	rounds  = 50
	pause   = 20 * time.Millisecond
)

var ctx = context.Background()

func main() {
	pool, err := pgxpool.Connect(ctx, "pool_max_conns=3")
	check(err)
	defer pool.Close()
	_, err = pool.Exec(ctx, "drop schema if exists "+schema+" cascade")
	check(err)
	_, err = pool.Exec(ctx, "create schema "+schema+" create table item (worker int, round int, note text, unique (worker, round))")
	check(err)
	seconds, err := strconv.ParseFloat(os.Getenv("ROUNDS_SECONDS"), 64)
	check(err)
	end := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	var group sync.WaitGroup
	var done [workers]int
	for worker := range done {
		group.Add(1)
		go func(worker int) {
			defer group.Done()
			for ; time.Now().Before(end); done[worker]++ {
				c, err := pool.Acquire(ctx)
				check(err)
				round(c.Conn(), worker, done[worker]%rounds)
				c.Release()
				time.Sleep(pause)
			}
		}(worker)
	}
	group.Wait()
	fmt.Println(done[0] + done[1] + done[2])
}

func round(c *pgx.Conn, worker, round int) {
	settings := map[string]string{"search_path": schema, "timezone": fmt.Sprint("Etc/GMT+", worker), "statement_timeout": fmt.Sprint(30+worker, "s"), "app.tenant": fmt.Sprint(schema, " ", worker)}
	for name, value := range settings {
		_, err := c.Exec(ctx, fmt.Sprintf("set %s = '%s'", name, value))
		check(err)
	}
	for name, value := range settings {
		equal(name, one(c, "select current_setting($1)", name), value)
	}
	if round == 0 {
		_, err := c.Exec(ctx, "delete from item where worker = $1", worker)
		check(err)
	}
	insert := func(c pgx.Tx, note string) error {
		_, err := c.Exec(ctx, "insert into item values ($1, $2, $3)", worker, round, note)
		return err
	}
	check(c.BeginFunc(ctx, func(tx pgx.Tx) error {
		check(insert(tx, note(worker, round)))
		err := tx.BeginFunc(ctx, func(tx pgx.Tx) error { return insert(tx, "twice") })
		failure, ok := err.(*pgconn.PgError)
		equal("a key is unique", ok && failure.Code == "23505", true)
		equal("rows", one(tx, "select count(*) || ' ' || sum(round) from item where worker = $1", worker), fmt.Sprint(round+1, " ", round*(round+1)/2))
		return nil
	}))
	tx, err := c.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.Serializable})
	check(err)
	_, err = tx.Exec(ctx, "set local statement_timeout = '77s'")
	check(err)
	_, err = tx.Exec(ctx, "update item set note = 'undone' where worker = $1", worker)
	check(err)
	check(tx.Rollback(ctx))
	equal("timeout", one(c, "show statement_timeout"), settings["statement_timeout"])
	// A pipeline.
	batch := &pgx.Batch{}
	for it := 0; it <= round; it++ {
		batch.Queue("select note from item where worker = $1 and round = $2", worker, it)
	}
	results := c.SendBatch(ctx, batch)
	for it := 0; it <= round; it++ {
		var found string
		check(results.QueryRow().Scan(&found))
		equal("note", found, note(worker, it))
	}
	check(results.Close())
}

type queries interface {
	QueryRow(context.Context, string, ...interface{}) pgx.Row
}

func one(c queries, sql string, values ...interface{}) (found string) {
	check(c.QueryRow(ctx, sql, values...).Scan(&found))
	return found
}

func note(worker, round int) string {
	return fmt.Sprint(schema, " ", worker, " ", round)
}

func equal(what string, found, expected interface{}) {
	if found != expected {
		panic(fmt.Sprint(schema, ": ", what, ": ", found, " instead of ", expected))
	}
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
