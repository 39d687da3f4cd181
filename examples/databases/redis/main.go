// Command redis counts in a Redis server, over go-redis, whose connections show this
// process's X509-SVID and go to one SPIFFE ID.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"merlon.dev/sdk"
)

// grace is longer than any command takes, and shorter than what is left of an
// X509-SVID when the next one comes: half its life.
const grace = 2 * time.Second

func main() {
	address := flag.String("address", "localhost:6379", "the server")
	server := flag.String("server", "redis", "the service that has to answer")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	id, err := sdk.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	open := func() *redis.Client {
		opts := &redis.Options{Addr: *address, Dialer: id.DialTLS(sdk.Service(*server), "redis"), MaxRetries: -1} // there is nothing to try twice
		if own, err := id.GetX509SVID(); err == nil {
			// Connections also end with the server's X509-SVID, so none gets old.
			opts.ConnMaxLifetime = time.Until(own.Certificates[0].NotAfter) / 8
		}
		return redis.NewClient(opts)
	}
	// go-redis cannot be told to drop its connections, so there is a new client
	// after each rotation; the old one goes when its commands are done.
	var client atomic.Pointer[redis.Client]
	client.Store(open())
	id.OnRotate(func() {
		old := client.Swap(open())
		time.AfterFunc(grace, func() { _ = old.Close() }) // its connections end in any case
	})
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() { count(ctx, id, &client) })
	}
	workers.Wait()
	_ = client.Load().Close() // the process ends
	id.Close()
}

// count says with which X509-SVID it counts, when that changes.
func count(ctx context.Context, id *sdk.Identity, client *atomic.Pointer[redis.Client]) {
	last := ""
	for ctx.Err() == nil {
		n, err := client.Load().Incr(context.WithoutCancel(ctx), "calls").Result()
		if err != nil {
			log.Fatal(err)
		}
		if own, err := id.GetX509SVID(); err == nil {
			if serial := own.Certificates[0].SerialNumber.Text(16); serial != last {
				fmt.Println(n, serial)
				last = serial
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}
