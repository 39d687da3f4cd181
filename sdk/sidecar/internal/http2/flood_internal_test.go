// What one connection can cost (SECURITY.md T38): floods end with the connection, and
// what waits for a peer is bounded.

package http2

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	codec "golang.org/x/net/http2"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// forever is more than any flood needs.
const forever = 50_000

func TestFloodsEndWithTheConnection(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	healthy := r.client()
	healthy.isServed(1)
	id := uint32(3)
	next := uint32(1)
	for name, tt := range map[string]struct {
		begin, flood func(c *raw)
	}{
		"PING":             {nil, func(c *raw) { c.fr.WritePing(false, [8]byte{}) }},
		"SETTINGS":         {nil, func(c *raw) { c.fr.WriteSettings(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 1}) }},
		"PRIORITY":         {nil, func(c *raw) { c.fr.WritePriority(1, codec.PriorityParam{Weight: 1}) }},
		"unknown frames":   {nil, func(c *raw) { c.fr.WriteRawFrame(0xfe, 0, 0, nil) }},
		"WINDOW_UPDATE":    {nil, func(c *raw) { c.fr.WriteWindowUpdate(0, 1) }},
		"GOAWAY":           {nil, func(c *raw) { c.fr.WriteGoAway(0, codec.ErrCodeNo, nil) }},
		"empty DATA":       {func(c *raw) { c.headers(1, false, with(":method", "POST")...) }, func(c *raw) { c.fr.WriteData(1, false, nil) }},
		"padded DATA":      {func(c *raw) { c.headers(1, false, with(":method", "POST")...) }, func(c *raw) { c.fr.WriteDataPadded(1, false, nil, make([]byte, 8)) }},
		"DATA for nobody":  {func(c *raw) { c.headers(1, true, good...); c.await(1) }, func(c *raw) { c.fr.WriteData(1, false, nil) }},
		"RST_STREAM again": {func(c *raw) { c.headers(1, true, good...); c.await(1) }, func(c *raw) { c.fr.WriteRSTStream(1, codec.ErrCodeCancel) }},
		"rapid reset": {func(*raw) { next = 1 }, func(c *raw) {
			c.headers(next, false, with(":method", "POST")...)
			c.fr.WriteRSTStream(next, codec.ErrCodeCancel)
			next += 2
		}},
		"requests that are malformed": {func(*raw) { next = 1 }, func(c *raw) {
			c.headers(next, true, with("connection", "x")...)
			next += 2
		}},
		"CONTINUATION": {
			func(c *raw) {
				c.fr.WriteHeaders(codec.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: c.block(good...)})
			},
			func(c *raw) { c.fr.WriteContinuation(1, false, nil) },
		},
		"CONTINUATION with fields": {
			func(c *raw) {
				c.fr.WriteHeaders(codec.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: c.block(good...)})
			},
			func(c *raw) { c.fr.WriteContinuation(1, false, c.block("x", strings.Repeat("y", 8000))) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := r.client()
			if tt.begin != nil {
				tt.begin(c)
			}
			over := make(chan answer, 1)
			c.silent = true
			go func() { over <- c.await(1 << 20) }()
			var got *answer
			for n := 0; got == nil && n < forever; n++ {
				tt.flood(c)
				select {
				case a := <-over:
					got = &a
				default:
				}
			}
			if got == nil {
				select {
				case a := <-over:
					got = &a
				case <-time.After(30 * time.Second):
					t.Fatalf("%d frames, and the connection lives", forever)
				}
			}
			// The reset that closing brings may overtake what GOAWAY says.
			if got.goAway != codec.ErrCodeEnhanceYourCalm && got.goAway != codec.ErrCodeNo {
				t.Errorf("%+v; want ENHANCE_YOUR_CALM", got)
			}
			healthy.isServed(id)
			id += 2
		})
	}
	await(t, "connections to leave", func() bool { return len(r.engine.all()) == 2 }) // healthy's two ends
}

// A body that is asked for byte by byte costs much more than it brings.
func TestDribbleEndsWithTheConnection(t *testing.T) {
	a, _ := endless(t)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 0})
	c.headers(1, true, good...)
	over := make(chan answer, 1)
	c.silent = true
	go func() { over <- c.await(1 << 20) }()
	for range forever {
		if c.fr.WriteWindowUpdate(1, 1) != nil {
			break
		}
	}
	if got := <-over; !got.isOver || got.goAway != codec.ErrCodeEnhanceYourCalm && got.goAway != codec.ErrCodeNo {
		t.Errorf("%+v", got)
	}
	if e := r.recorded(1)[0]; e.BytesOut > 1<<20 {
		t.Errorf("record %+v", e)
	}
}

// Cancelling is no flood where others are served, and neither are probes beside bodies.
func TestWhatIsNoFlood(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client()
	for id := uint32(1); id < 4*2*resetPatience; id += 4 {
		c.headers(id, false, with(":method", "POST")...)
		c.fr.WriteRSTStream(id, codec.ErrCodeCancel)
		c.fr.WritePing(false, [8]byte{})
		c.isServed(id + 2)
	}
}

func TestMoreStreamsThanAllowed(t *testing.T) {
	a := newApp(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	r := newRig(t, hop.Inbound, policy.HTTP, func(l *hop.Limits) { l.Streams = 10 }, a.addr)
	c := r.client()
	for id := uint32(1); id < 2*11; id += 2 {
		c.headers(id, true, good...)
	}
	if got := c.await(21); !got.isReset || got.reset != codec.ErrCodeRefusedStream {
		t.Errorf("%+v", got)
	}
	await(t, "the app to see ten", func() bool { return len(a.requests()) == 10 })
	r.recorded(0)
}

func TestDeadlines(t *testing.T) {
	a := newApp(t, nil)
	heads := newRig(t, hop.Inbound, policy.HTTP, func(l *hop.Limits) { l.HeadTimeout, l.IdleTimeout = time.Second, time.Hour }, a.addr)
	idle := newRig(t, hop.Inbound, policy.HTTP, func(l *hop.Limits) { l.HeadTimeout, l.IdleTimeout = time.Hour, time.Second }, a.addr)
	for name, connect := range map[string]func() *raw{
		"nothing":              heads.connect,
		"preface, no settings": func() *raw { c := heads.connect(); io.WriteString(c.conn, codec.ClientPreface); return c },
		"half a preface":       func() *raw { c := heads.connect(); io.WriteString(c.conn, codec.ClientPreface[:10]); return c },
		"half a list of fields": func() *raw {
			c := heads.client()
			c.fr.WriteHeaders(codec.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: c.block(good...)})
			return c
		},
		"idle from the start":  func() *raw { return idle.client() },
		"idle after a request": func() *raw { c := idle.client(); c.isServed(1); return c },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := connect().await(1 << 20); !got.isOver {
				t.Errorf("%+v", got)
			}
		})
	}
}

// endless is an app whose answers do not end, and which counts what it could send.
func endless(t *testing.T) (*app, *atomic.Int64) {
	sent := new(atomic.Int64)
	return newApp(t, func(w http.ResponseWriter, r *http.Request) {
		piece := make([]byte, 16<<10)
		for r.Context().Err() == nil {
			n, err := w.Write(piece)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	}), sent
}

func TestWhatWaitsForAPeerIsBounded(t *testing.T) {
	a, sent := endless(t)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 0})
	const streams = 20
	for id := uint32(1); id < 2*streams; id += 2 {
		c.headers(id, true, good...)
	}
	await(t, "the app to be asked", func() bool { return len(a.requests()) == streams })
	settle(t, sent)
	// What the app's own server keeps for a stream is in it too.
	if n := sent.Load(); n > streams*(firstWindow+64<<10) {
		t.Errorf("%d bytes wait for a peer that opens no window", n)
	}
	for id := uint32(1); id < 2*streams; id += 2 {
		c.fr.WriteRSTStream(id, codec.ErrCodeCancel)
	}
	r.recorded(streams)
	// Windows of the upstream's connection are whole again.
	c.fr.WriteSettings(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 1 << 20})
	c.fr.WriteWindowUpdate(0, 1<<20)
	c.headers(2*streams+1, true, good...)
	for got := 0; got < 1<<20; {
		d, ok := c.next().(*codec.DataFrame)
		if ok && d.StreamID == 2*streams+1 {
			got += len(d.Data())
		}
	}
}

// settle waits until n stands still.
func settle(t *testing.T, n *atomic.Int64) {
	for last := int64(-1); last != n.Load(); time.Sleep(300 * time.Millisecond) {
		last = n.Load()
	}
}

// A body that the app does not read waits at its sender.
func TestBodiesThatAreNotReadWaitAtTheirSender(t *testing.T) {
	release := make(chan struct{})
	var read atomic.Int64
	a := newApp(t, func(_ http.ResponseWriter, r *http.Request) {
		<-release
		n, _ := io.Copy(io.Discard, r.Body)
		read.Add(n)
	})
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	c := r.client()
	c.headers(1, false, with(":method", "POST")...)
	window, sent := 64<<10-1, 0
	frames := make(chan codec.Frame)
	go func() {
		defer close(frames)
		for f := c.next(); f != nil; f = c.next() {
			if w, ok := f.(*codec.WindowUpdateFrame); ok && w.StreamID == 1 {
				select {
				case frames <- &codec.WindowUpdateFrame{FrameHeader: w.FrameHeader, Increment: w.Increment}:
				case <-t.Context().Done():
				}
			}
		}
	}()
	const most = 4 << 20
	push := func(patience time.Duration) {
		for sent <= most { // an app that reads lets it go on for ever
			for ; window > 0; window -= min(window, 16<<10) {
				c.fr.WriteData(1, false, make([]byte, min(window, 16<<10)))
				sent += min(window, 16<<10)
			}
			select {
			case f, ok := <-frames:
				if !ok {
					t.Error("the connection has ended")
					return
				}
				window += int(f.(*codec.WindowUpdateFrame).Increment)
			case <-time.After(patience):
				return
			}
		}
	}
	push(time.Second)
	// The sidecar's window, and that of Go's server, which is 1 MiB.
	if sent > 2<<20 {
		t.Errorf("%d bytes were taken for an app that reads nothing", sent)
	}
	close(release)
	await(t, "the rest to be taken", func() bool { push(10 * time.Millisecond); return sent > most })
	c.fr.WriteData(1, true, nil)
	await(t, "the app to read it all", func() bool { return read.Load() == int64(sent) })
}

func TestWindowsAreHeldTo(t *testing.T) {
	a := newApp(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	for name, tt := range map[string]struct {
		do   func(c *raw)
		want answer
	}{
		"more than the stream's window": {func(c *raw) {
			for range 80 { // the app's server takes none of it
				c.fr.WriteData(1, false, make([]byte, 16<<10))
			}
		}, answer{isReset: true, reset: codec.ErrCodeFlowControl}},
		"more than the connection's window": {func(c *raw) {
			for id := uint32(3); id < 2*60; id += 2 { // the app's server takes 1 MiB
				c.headers(id, false, with(":method", "POST")...)
				for n := firstWindow; n > 0; n -= min(n, 16<<10) {
					c.fr.WriteData(id, false, make([]byte, min(n, 16<<10)))
				}
			}
		}, answer{isOver: true, goAway: codec.ErrCodeFlowControl}},
		"a stream's window that overflows": {func(c *raw) { c.fr.WriteWindowUpdate(1, 1<<31-1) }, answer{isReset: true, reset: codec.ErrCodeFlowControl}},
		"no increment":                     {func(c *raw) { c.fr.WriteWindowUpdate(1, 0) }, answer{isReset: true, reset: codec.ErrCodeProtocol}},
		"the connection's overflows":       {func(c *raw) { c.fr.WriteWindowUpdate(0, 1<<31-1) }, answer{isOver: true, goAway: codec.ErrCodeFlowControl}},
		"initial windows that overflow": {func(c *raw) {
			c.fr.WriteWindowUpdate(1, 1<<30)
			c.fr.WriteSettings(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 1<<31 - 1})
		}, answer{isOver: true, goAway: codec.ErrCodeFlowControl}},
		"a frame that is too long": {func(c *raw) { c.fr.WriteData(1, false, make([]byte, 16<<10+1)) }, answer{isOver: true, goAway: codec.ErrCodeFrameSize}},
		"padding of all and more":  {func(c *raw) { c.fr.WriteRawFrame(codec.FrameData, codec.FlagDataPadded, 1, []byte{5, 0, 0}) }, answer{isOver: true, goAway: codec.ErrCodeProtocol}},
		"DATA for stream 0":        {func(c *raw) { c.fr.WriteData(0, false, nil) }, answer{isOver: true, goAway: codec.ErrCodeProtocol}},
		"a stream that goes back":  {func(c *raw) { c.headers(5, true, good...); c.headers(3, true, good...) }, answer{isOver: true, goAway: codec.ErrCodeStreamClosed}},
		"a stream of ours":         {func(c *raw) { c.headers(2, true, good...) }, answer{isOver: true, goAway: codec.ErrCodeProtocol}},
		"a broken list": {func(c *raw) {
			c.fr.WriteHeaders(codec.HeadersFrameParam{StreamID: 3, EndHeaders: true, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}})
		}, answer{isOver: true, goAway: codec.ErrCodeCompression}},
		"PUSH_PROMISE": {func(c *raw) {
			c.fr.WritePushPromise(codec.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true, BlockFragment: c.block(good...)})
		}, answer{isOver: true, goAway: codec.ErrCodeProtocol}},
	} {
		t.Run(name, func(t *testing.T) {
			c := r.client()
			c.headers(1, false, with(":method", "POST")...)
			tt.do(c)
			got := c.await(1)
			got.fields = nil
			if fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("%+v; want %+v", got, tt.want)
			}
		})
	}
}

// A request is as long as it says.
func TestBodiesAreAsLongAsTheySay(t *testing.T) {
	a := newApp(t, nil)
	r := newRig(t, hop.Inbound, policy.HTTP, nil, a.addr)
	for name, body := range map[string]string{"longer": "12345", "shorter": "123"} {
		t.Run(name, func(t *testing.T) {
			c := r.client()
			c.headers(1, false, with(":method", "POST", "content-length", "4")...)
			c.fr.WriteData(1, true, []byte(body))
			if got := c.await(1); !got.isReset || got.reset != codec.ErrCodeProtocol {
				t.Errorf("%+v", got)
			}
			c.headers(3, false, with(":method", "POST", "content-length", "4")...)
			c.fr.WriteData(3, false, []byte("12"))
			c.fr.WriteDataPadded(3, true, []byte("34"), make([]byte, 7))
			if got := c.await(3); got.fields[":status"] != "200" {
				t.Errorf("%+v", got)
			}
		})
	}
	c := r.client()
	c.headers(1, false, with(":method", "POST", "content-length", "4")...)
	c.fr.WriteData(1, false, []byte("123"))
	c.headers(1, true, "x-sum", "3")
	if got := c.await(1); !got.isReset || got.reset != codec.ErrCodeProtocol {
		t.Errorf("shorter, with trailers: %+v", got)
	}
	for _, s := range a.requests() {
		if s.body != "1234" && s.body != "" {
			t.Errorf("the app took %q for a whole body", s.body)
		}
	}
}

func TestQueueIsFirstInFirstOut(t *testing.T) {
	var q queue
	var want, got bytes.Buffer
	for i := range 300 {
		piece := bytes.Repeat([]byte{byte(i)}, i*i%40_000)
		want.Write(piece)
		q.push(piece)
		for q.n > 0 && i%3 == 0 {
			b := q.first(i*37 + 1)
			got.Write(b)
			q.advance(len(b))
		}
	}
	rest := q.n
	if want.Len() != got.Len()+rest || !bytes.HasPrefix(want.Bytes(), got.Bytes()) {
		t.Errorf("%d bytes in, %d out and %d left", want.Len(), got.Len(), rest)
	}
	if n := q.drop(); n != rest || q.n != 0 || q.head != nil {
		t.Errorf("dropped %d; want %d", n, rest)
	}
}
