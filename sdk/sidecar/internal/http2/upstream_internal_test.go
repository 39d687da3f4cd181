// Upstreams that go away, refuse, break rules or are full, and the end of an engine.

package http2

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	codec "golang.org/x/net/http2"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// script is an upstream that does what a test says with each frame; n is the number of
// its connection.
func script(t testing.TB, settings []codec.Setting, on func(n int, c *raw, f codec.Frame)) (addr string) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	all.Go(func() {
		for n := 1; ; n++ {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			all.Go(func() {
				c := newRaw(t, conn)
				io.ReadFull(conn, make([]byte, len(codec.ClientPreface)))
				c.fr.WriteSettings(settings...)
				for f := c.next(); f != nil; f = c.next() {
					if s, ok := f.(*codec.SettingsFrame); ok && !s.IsAck() {
						c.fr.WriteSettingsAck()
					}
					if h, ok := f.(*codec.HeadersFrame); ok { // the table has to be kept up
						c.dec.DecodeFull(h.HeaderBlockFragment())
					}
					on(n, c, f)
				}
			})
		}
	})
	t.Cleanup(func() {
		lis.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return lis.Addr().String()
}

// ok answers a stream.
func ok(c *raw, id uint32) { c.headers(id, true, ":status", "200") }

func TestUnprocessedRequestsAreTriedAgain(t *testing.T) {
	for name, refuse := range map[string]func(c *raw, id uint32){
		"GOAWAY":     func(c *raw, _ uint32) { c.fr.WriteGoAway(0, codec.ErrCodeNo, nil) },
		"RST_STREAM": func(c *raw, id uint32) { c.fr.WriteRSTStream(id, codec.ErrCodeRefusedStream) },
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			refused := 0
			up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
				h, isHeaders := f.(*codec.HeadersFrame)
				if !isHeaders {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if refused++; refused == 1 {
					refuse(c, h.StreamID)
					return
				}
				ok(c, h.StreamID)
			})
			r := newRig(t, hop.Inbound, policy.HTTP, nil, up)
			r.client().isServed(1)
			if e := r.recorded(1)[0]; e.Failed || e.Status != 200 {
				t.Errorf("record %+v", e)
			}
		})
	}
}

// An upstream that never takes a request is asked as often as may be, and the caller is
// told that he may ask again.
func TestTriesEnd(t *testing.T) {
	var times atomic.Int64
	up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
		if h, ok := f.(*codec.HeadersFrame); ok {
			times.Add(1)
			c.fr.WriteRSTStream(h.StreamID, codec.ErrCodeRefusedStream)
		}
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, up)
	c := r.client()
	c.headers(1, true, good...)
	if got := c.await(1); !got.isReset || got.reset != codec.ErrCodeRefusedStream {
		t.Errorf("%+v", got)
	}
	if e := r.recorded(1)[0]; times.Load() != 3 || e.Retries != 2 {
		t.Errorf("tried %d times, record %+v", times.Load(), e)
	}
	if made, _ := r.hop.Upstreams.Retries(); made != 2 {
		t.Errorf("%d retries are counted", made)
	}
}

// Where a connection breaks off, requests that may be made twice are, and no others.
func TestRequestsOfALostConnectionAreTriedAgainWhereThatIsSafe(t *testing.T) {
	for name, tc := range map[string]struct {
		method string
		end    bool
		before func(c *raw, id uint32) // of the end
		want   string
	}{
		"a method that may be":       {"GET", true, func(*raw, uint32) {}, "200"},
		"one that may not be":        {"POST", true, func(*raw, uint32) {}, "502"},
		"with a body":                {"GET", false, func(*raw, uint32) {}, "502"},
		"after a hint":               {"GET", true, func(c *raw, id uint32) { c.headers(id, false, ":status", "103") }, "502"},
		"after its answer has begun": {"GET", true, func(c *raw, id uint32) { c.headers(id, false, ":status", "200") }, "reset"},
	} {
		t.Run(name, func(t *testing.T) {
			var times atomic.Int64
			up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
				h, ok := f.(*codec.HeadersFrame)
				switch {
				case !ok:
				case times.Add(1) == 1:
					tc.before(c, h.StreamID)
					c.conn.Close()
				default:
					c.headers(h.StreamID, true, ":status", "200")
				}
			})
			r := newRig(t, hop.Inbound, policy.HTTP, nil, up)
			c := r.client()
			c.headers(1, tc.end, with(":method", tc.method)...)
			if !tc.end {
				c.fr.WriteData(1, true, []byte("body"))
			}
			got := c.await(1)
			status := got.fields[":status"]
			status = strings.TrimPrefix(status, "103,")
			if got.isReset {
				status = "reset"
			}
			want := int64(1)
			if tc.want == "200" {
				want = 2
			}
			if status != tc.want || times.Load() != want {
				t.Errorf("%+v, tried %d times; want %s after %d", got, times.Load(), tc.want, want)
			}
			if e := r.recorded(1)[0]; int64(e.Retries) != want-1 {
				t.Errorf("record %+v", e)
			}
			if n := r.hop.Upstreams.All()[0].Active(); n != 0 {
				t.Errorf("%d requests are still counted", n)
			}
		})
	}
}

// What was sent of a body is not kept, so the caller has to know that it may try again.
func TestWhatCannotBeTriedAgainHereIsForTheCaller(t *testing.T) {
	times := 0
	up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
		if d, isData := f.(*codec.DataFrame); isData {
			times++
			c.fr.WriteRSTStream(d.StreamID, codec.ErrCodeRefusedStream)
		}
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, up)
	c := r.client()
	c.headers(1, false, with(":method", "POST")...)
	c.fr.WriteData(1, true, []byte("body"))
	if got := c.await(1); !got.isReset || got.reset != codec.ErrCodeRefusedStream {
		t.Errorf("%+v", got)
	}
	if e := r.recorded(1)[0]; !e.Failed || times != 1 {
		t.Errorf("tried %d times, record %+v", times, e)
	}
}

func TestUpstreamsThatBreakOff(t *testing.T) {
	for name, tt := range map[string]struct {
		do         func(c *raw, id uint32)
		http, grpc string // status, or RST_STREAM
	}{
		"connection ends": {func(c *raw, _ uint32) { c.conn.Close() }, "502", "14"},
		"connection ends in an answer": {func(c *raw, id uint32) {
			c.headers(id, false, ":status", "200")
			c.fr.WriteData(id, false, []byte("x"))
			c.fr.WritePing(false, [8]byte{})
		}, "INTERNAL_ERROR", "14"},
		"reset":                     {func(c *raw, id uint32) { c.fr.WriteRSTStream(id, codec.ErrCodeInternal) }, "INTERNAL_ERROR", "INTERNAL_ERROR"},
		"reset about the protocol":  {func(c *raw, id uint32) { c.fr.WriteRSTStream(id, codec.ErrCodeFlowControl) }, "INTERNAL_ERROR", "INTERNAL_ERROR"},
		"no status":                 {func(c *raw, id uint32) { c.headers(id, true, "x-a", "1") }, "502", "14"},
		"status 101":                {func(c *raw, id uint32) { c.headers(id, false, ":status", "101") }, "502", "14"},
		"connection-specific field": {func(c *raw, id uint32) { c.headers(id, true, ":status", "200", "connection", "close") }, "502", "14"},
		"line end in a value":       {func(c *raw, id uint32) { c.headers(id, true, ":status", "200", "x-a", "1\r\n2") }, "502", "14"},
		"pseudo field in trailers":  {func(c *raw, id uint32) { c.headers(id, false, ":status", "200"); c.headers(id, true, ":status", "200") }, "INTERNAL_ERROR", "14"},
		"more than its window": {func(c *raw, id uint32) {
			c.headers(id, false, ":status", "200")
			for range 80 {
				c.fr.WriteData(id, false, make([]byte, 16<<10))
			}
		}, "INTERNAL_ERROR", "14"},
		"too many fields": {func(c *raw, id uint32) {
			c.headers(id, true, append([]string{":status", "200"}, strings.Split(strings.Repeat("x-a,1,", 101)+"x,y", ",")...)...)
		}, "502", "14"},
	} {
		for _, protocol := range []policy.Protocol{policy.HTTP, policy.GRPC} {
			t.Run(name+"/"+string(protocol), func(t *testing.T) {
				up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
					switch f := f.(type) {
					case *codec.HeadersFrame:
						tt.do(c, f.StreamID)
					case *codec.PingFrame: // what was sent before has arrived
						c.conn.Close()
					}
				})
				r := newRig(t, hop.Inbound, protocol, nil, up)
				c := r.client(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 1000}) // nothing is swallowed
				c.headers(1, true, append(with(":method", "POST", ":path", "/shop.Orders/Get"), "content-type", "application/grpc")...)
				got, want := c.await(1), tt.http
				said := got.fields[":status"]
				if got.isReset {
					said = got.reset.String()
				} else if protocol == policy.GRPC {
					said = got.fields["grpc-status"]
				}
				if protocol == policy.GRPC {
					want = tt.grpc
				}
				if said != want {
					t.Errorf("%+v; want %s", got, want)
				}
				if e := r.recorded(1)[0]; !e.Failed || e.Err == "" || e.Reason != policy.Allowed {
					t.Errorf("record %+v", e)
				}
			})
		}
	}
}

// An answer that is complete is passed on, whatever the upstream does then.
func TestAnswersBeforeTheRequestHasEnded(t *testing.T) {
	up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
		if h, isHeaders := f.(*codec.HeadersFrame); isHeaders {
			c.headers(h.StreamID, false, ":status", "413")
			c.fr.WriteData(h.StreamID, true, []byte("too large"))
			c.fr.WriteRSTStream(h.StreamID, codec.ErrCodeNo)
		}
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, up)
	c := r.client()
	c.headers(1, false, with(":method", "POST")...)
	if got := c.await(1); got.fields[":status"] != "413" || got.body != "too large" {
		t.Errorf("%+v", got)
	}
	if f, isReset := c.next().(*codec.RSTStreamFrame); !isReset || f.ErrCode != codec.ErrCodeNo {
		t.Errorf("the caller is not told to stop: %v", f)
	}
	if e := r.recorded(1)[0]; e.Failed || e.Status != 413 || e.BytesOut != 9 {
		t.Errorf("record %+v", e)
	}
}

func TestInformationalAnswersAndTrailersComeThrough(t *testing.T) {
	up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
		if h, isHeaders := f.(*codec.HeadersFrame); isHeaders {
			c.headers(h.StreamID, false, ":status", "103", "link", "</style.css>")
			c.headers(h.StreamID, false, ":status", "200")
			c.fr.WriteData(h.StreamID, false, []byte("body"))
			c.headers(h.StreamID, true, "x-sum", "4")
		}
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, up)
	c := r.client()
	c.headers(1, true, good...)
	if got := c.await(1); got.fields[":status"] != "103,200" || got.fields["link"] == "" || got.fields["x-sum"] != "4" || got.body != "body" {
		t.Errorf("%+v", got)
	}
}

// An upstream that takes few requests at a time gets more connections.
func TestFullConnectionsGetOthersBeside(t *testing.T) {
	var mu sync.Mutex
	conns := map[int]int{}
	up := script(t, []codec.Setting{{ID: codec.SettingMaxConcurrentStreams, Val: 2}}, func(n int, c *raw, f codec.Frame) {
		if _, isHeaders := f.(*codec.HeadersFrame); isHeaders {
			mu.Lock()
			conns[n]++
			mu.Unlock()
		}
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, up)
	c := r.client()
	for id := uint32(1); id < 20; id += 2 {
		c.headers(id, true, good...)
	}
	await(t, "ten requests", func() bool {
		mu.Lock()
		defer mu.Unlock()
		sum := 0
		for _, n := range conns {
			sum += n
		}
		return sum == 10
	})
	mu.Lock()
	defer mu.Unlock()
	for n, streams := range conns {
		if streams > 2 {
			t.Errorf("connection %d got %d requests at a time", n, streams)
		}
	}
}

func TestAnotherUpstreamIsTried(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis.Close()
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, lis.Addr().String(), a.addr)
	c := r.client()
	for id := uint32(1); id < 40; id += 2 {
		c.isServed(id)
	}
}

func TestDrain(t *testing.T) {
	release := make(chan struct{})
	a := newApp(t, func(w http.ResponseWriter, _ *http.Request) {
		<-release
		io.WriteString(w, "done")
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client()
	c.headers(1, true, good...)
	await(t, "the request", func() bool { return len(a.requests()) == 1 })
	r.drain()
	said := 0
	for said < 2 {
		switch f := c.next().(type) {
		case nil:
			t.Fatal("the connection ended with a request under way")
		case *codec.GoAwayFrame:
			said++
			if want := []uint32{1<<31 - 1, 3}[said-1]; f.ErrCode != codec.ErrCodeNo || f.LastStreamID != want {
				t.Errorf("GOAWAY %d: %v", said, f)
			}
			if said == 1 { // it was on its way
				c.headers(3, true, good...)
				await(t, "the second request", func() bool { return len(a.requests()) == 2 })
			}
		}
	}
	c.headers(5, true, good...)
	close(release)
	if got := c.await(1); got.body != "done" {
		t.Errorf("%+v", got)
	}
	if got := c.await(1 << 20); !got.isOver {
		t.Errorf("%+v", got)
	}
	if n := len(a.requests()); n != 2 {
		t.Errorf("the app saw %d requests", n)
	}
}

// Go's own client and server find nothing wrong, also with bodies that cross.
func TestGoClient(t *testing.T) {
	a := newApp(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		n, _ := io.Copy(w, r.Body)
		w.Header().Set("X-Sum", fmt.Sprint(n))
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	transport := &http.Transport{DialTLSContext: r.dial, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			want := bytes.Repeat([]byte{byte(i)}, i*i*1000)
			res, err := client.Post("https://"+r.addr+"/echo", "text/plain", bytes.NewReader(want))
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			got, err := io.ReadAll(res.Body)
			if err != nil || !bytes.Equal(got, want) || res.Trailer.Get("X-Sum") != fmt.Sprint(len(want)) {
				t.Errorf("%d bytes came back of %d, %v, trailer %v", len(got), len(want), err, res.Trailer)
			}
		})
	}
	all.Wait()
	r.recorded(32)
}

// Answers that do not begin and streams that stand still end; silent gRPC calls go on.
func TestRequestsThatTakeTooLong(t *testing.T) {
	second := func(l *hop.Limits) { l.ResponseTimeout, l.StallTimeout = time.Second, time.Second }
	for name, tt := range map[string]struct {
		protocol policy.Protocol
		do       func(c *raw, id uint32)
		want     string
	}{
		"no answer":                   {policy.HTTP, func(*raw, uint32) {}, "504"},
		"an answer that stands still": {policy.HTTP, func(c *raw, id uint32) { c.headers(id, false, ":status", "200") }, "INTERNAL_ERROR"},
		"a message that is not read": {policy.GRPC, func(c *raw, id uint32) {
			c.headers(id, false, ":status", "200")
			c.fr.WriteData(id, false, make([]byte, 2000))
		}, "4"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up := script(t, nil, func(_ int, c *raw, f codec.Frame) {
				if h, isHeaders := f.(*codec.HeadersFrame); isHeaders {
					tt.do(c, h.StreamID)
				}
			})
			r := newRig(t, hop.Inbound, tt.protocol, second, up)
			c := r.client(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 1000})
			c.headers(1, true, append(with(":method", "POST", ":path", "/shop.Orders/Get"), "content-type", "application/grpc")...)
			got := c.await(1)
			said := got.fields[":status"]
			if got.isReset {
				said = got.reset.String()
			} else if tt.protocol == policy.GRPC {
				said = got.fields["grpc-status"]
			}
			if said != tt.want {
				t.Errorf("%+v; want %s", got, tt.want)
			}
			if e := r.recorded(1)[0]; !e.Failed {
				t.Errorf("record %+v", e)
			}
		})
	}
	t.Run("a silent stream", func(t *testing.T) {
		t.Parallel()
		release := make(chan struct{})
		a := newApp(t, func(http.ResponseWriter, *http.Request) { <-release })
		r := newRig(t, hop.Inbound, policy.GRPC, second, a.addr)
		c := r.client()
		c.headers(1, true, append(with(":method", "POST", ":path", "/shop.Orders/Watch"), "content-type", "application/grpc")...)
		begun := r.engine.clock.Load()
		await(t, "three rounds of the keeper", func() bool { return r.engine.clock.Load() > begun+3 })
		r.recorded(0)
		close(release)
		if got := c.await(1); got.fields[":status"] != "200" {
			t.Errorf("%+v", got)
		}
	})
}
