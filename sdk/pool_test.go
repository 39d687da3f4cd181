// A pool of connections to a plain listener, while X509-SVIDs rotate on both sides
// and the first ones expire: no exchange fails.

package sdk_test

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

func TestPoolOutlivesRotations(t *testing.T) {
	const life = 6 * time.Second
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.SetTTL(life)
	began := time.Now()
	address := listen(t, td.Workload("orders"))
	web := td.Workload("web")

	// Idle connections, each with the rotation that it belongs to.
	type idle struct {
		net.Conn
		rotation int64
	}
	pool := make(chan idle, 16)
	var rotations atomic.Int64
	defer web.OnRotate(func() { rotations.Add(1) })()
	dial := web.DialTLS(sdk.Service("orders"))
	exchange := func() error {
		var c idle
		select {
		case c = <-pool:
		default:
		}
		if now := rotations.Load(); c.Conn == nil || c.rotation != now {
			if c.Conn != nil {
				c.Close()
			}
			conn, err := dial(t.Context(), "tcp", address)
			if err != nil {
				return err
			}
			c = idle{conn, now}
		}
		if err := say(c, "hello"); err != nil {
			c.Close()
			return err
		}
		pool <- c
		return nil
	}
	var workers sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		workers.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				if err := exchange(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for time.Since(began) < life+life/4 || rotations.Load() < 10 {
		td.Rotate("orders")
		td.Rotate("web")
		time.Sleep(life / 20)
	}
	close(stop)
	workers.Wait()
	for len(pool) > 0 {
		(<-pool).Close()
	}
}
