// Foreign bytes: whatever comes, from either side, ends in order.

package http2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// frameBytes are the frames that write writes.
func frameBytes(write func(c *raw)) []byte {
	var out bytes.Buffer
	c := &raw{fr: codec.NewFramer(&out, nil)}
	c.fr.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.buf)
	write(c)
	return out.Bytes()
}

// FuzzFrames has a caller and an upstream send what they like: no request goes on
// for ever, and nothing stays behind.
func FuzzFrames(f *testing.F) {
	f.Add(frameBytes(func(c *raw) {
		c.headers(1, false, with(":method", "POST", "content-length", "4")...)
		c.fr.WriteData(1, false, []byte("ab"))
		c.fr.WriteDataPadded(1, true, []byte("cd"), make([]byte, 3))
		c.headers(3, true, good...)
		c.fr.WriteRSTStream(3, codec.ErrCodeCancel)
		c.fr.WritePing(false, [8]byte{})
	}), frameBytes(func(c *raw) {
		c.headers(1, false, ":status", "100")
		c.headers(1, false, ":status", "200")
		c.fr.WriteData(1, false, []byte("x"))
		c.headers(1, true, "x-sum", "1")
		c.fr.WriteGoAway(1, codec.ErrCodeNo, nil)
	}))
	f.Add(frameBytes(func(c *raw) {
		c.fr.WriteHeaders(codec.HeadersFrameParam{StreamID: 1, BlockFragment: c.block(good...), Priority: codec.PriorityParam{StreamDep: 1, Weight: 3}})
		c.fr.WriteContinuation(1, true, c.block("x-a", "1"))
		c.headers(1, true, "x-trailer", "1")
		c.fr.WriteSettings(codec.Setting{ID: codec.SettingInitialWindowSize, Val: 0}, codec.Setting{ID: codec.SettingHeaderTableSize, Val: 0})
		c.fr.WriteWindowUpdate(1, 3)
	}), frameBytes(func(c *raw) {
		c.fr.WriteRSTStream(1, codec.ErrCodeRefusedStream)
		c.fr.WriteData(1, true, make([]byte, 100))
		c.fr.WriteWindowUpdate(0, 1<<31-1)
	}))
	f.Fuzz(func(t *testing.T, caller, upstream []byte) {
		h := &hop.Hop{
			Name: "test", Direction: hop.Outbound, Protocol: policy.HTTP, Limits: limits(),
			Strip:  func(string) bool { return false },
			Record: func(*hop.Entry) {},
		}
		var ends sync.WaitGroup
		h.Upstreams = hop.NewUpstreams(&hop.Upstream{Address: "fuzz", Dial: func(context.Context) (net.Conn, error) {
			near, far := net.Pipe()
			ends.Go(func() { io.Copy(io.Discard, far) })
			ends.Go(func() {
				far.Write(frameBytes(func(c *raw) { c.fr.WriteSettings() }))
				far.Write(upstream)
			})
			return near, nil
		}})
		e := New(h).(*engine)
		near, far := net.Pipe()
		ends.Go(func() { io.Copy(io.Discard, far) })
		ends.Go(func() {
			io.WriteString(far, codec.ClientPreface)
			far.Write(frameBytes(func(c *raw) { c.fr.WriteSettings() }))
			far.Write(caller)
			far.Close()
		})
		e.Serve(context.Background(), near)
		e.Close()
		ends.Wait()
		if left := len(e.all()); left != 0 {
			t.Errorf("%d connections stay behind", left)
		}
		if n := h.Upstreams.All()[0].Active(); n != 0 {
			t.Errorf("%d requests are under way for ever", n)
		}
	})
}

// FuzzHead: a request that is let through means one thing.
func FuzzHead(f *testing.F) {
	f.Add(":method\x00GET\x00:scheme\x00https\x00:authority\x00orders\x00:path\x00/a?b\x00cookie\x00a\x00cookie\x00b", false)
	f.Add(":method\x00POST\x00:scheme\x00http\x00:path\x00/a.B/C\x00host\x00orders\x00content-type\x00application/grpc+proto\x00te\x00trailers", true)
	f.Add(":method\x00CONNECT\x00:authority\x00a:1\x00content-length\x001", false)
	f.Fuzz(func(t *testing.T, text string, grpc bool) {
		parts := strings.Split(text, "\x00")
		var list []hpack.HeaderField
		for i := 0; i+1 < len(parts); i += 2 {
			list = append(list, hpack.HeaderField{Name: parts[i], Value: parts[i+1]})
		}
		h, err := readHead(list, grpc)
		if err != nil {
			return
		}
		switch {
		case policy.CheckPath(h.path) != nil, h.target != h.path && h.target != h.path+"?"+h.query,
			strings.ContainsAny(h.method+h.authority+h.target, "\r\n\x00 \t#"), h.method == "CONNECT", h.authority == "", strings.ContainsAny(h.authority, "/@\\"),
			h.scheme != "http" && h.scheme != "https":
			t.Errorf("let through: %+v", h)
		}
		in := h.input(policy.HTTP)
		seen := in.HeaderMap()
		for name, values := range seen {
			if got, ok := in.Header(name); !ok || !slices.Equal(got, values) {
				t.Errorf("%s is %q read alone, and %q among all", name, got, values)
			}
		}
		h.asDecided(&policy.Response{RemoveHeaders: []string{"cookie"}}, &hop.Caller{ID: "spiffe://td/web"})
		if fmt.Sprint(in.HeaderMap()) != fmt.Sprint(seen) {
			t.Errorf("the policy sees %v after it has seen %v", in.HeaderMap(), seen)
		}
		h.fields = h.sent
		values := 0
		for _, f := range h.fields {
			if f.Name != strings.ToLower(f.Name) || strings.ContainsAny(f.Name+f.Value, "\r\n\x00") || f.IsPseudo() || f.Name == "host" || seen[f.Name] == nil {
				t.Errorf("let through: %q", f)
			}
			if f.Name == "content-length" {
				if values++; values > 1 || h.length < 0 {
					t.Errorf("lengths: %+v", h)
				}
			}
		}
	})
}
