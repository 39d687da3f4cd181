// Command postgres asks a PostgreSQL server again and again, over a pool of pgx whose
// connections log in with this process's X509-SVID: its common name is the user.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"merlon.dev/sdk"
)

func main() {
	url := flag.String("url", "postgres://app@localhost/postgres?sslmode=require", "the database; the user is the common name in the X509-SVID")
	server := flag.String("server", "postgres", "the service that has to answer")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	id, err := sdk.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	pool, err := connect(ctx, id, *url, sdk.Service(*server))
	if err != nil {
		log.Fatal(err)
	}
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() { ask(ctx, pool) })
	}
	workers.Wait()
	pool.Close()
	id.Close()
}

// connect makes a pool whose connections go to one SPIFFE ID, and which drops them
// when there is a new X509-SVID: those in use at their next return.
func connect(ctx context.Context, id *sdk.Identity, url string, to sdk.Target) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	cfg.ConnConfig.TLSConfig = id.ClientTLS(to, "postgresql")
	cfg.ConnConfig.Fallbacks = nil // they would have a TLS configuration of their own, or none
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	id.OnRotate(func() { go pool.Reset() })
	return pool, pool.Ping(ctx)
}

// ask says with which X509-SVID each answer was got, when that changes.
func ask(ctx context.Context, pool *pgxpool.Pool) {
	last := ""
	for ctx.Err() == nil {
		var user, serial string
		err := pool.QueryRow(context.WithoutCancel(ctx), "SELECT current_user, client_serial::text FROM pg_stat_ssl WHERE pid = pg_backend_pid()").Scan(&user, &serial)
		if err != nil {
			log.Fatal(err)
		}
		if serial != last {
			fmt.Println(user, serial)
			last = serial
		}
		time.Sleep(5 * time.Millisecond)
	}
}
