// What a request costs a pair of sidecars: both in this process, with caller and app
// that allocate nothing themselves in HTTP/1.1, and the same in every run in HTTP/2.

package sidecar

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// BenchmarkRequest is one GET after another through both sidecars, decided by a
// compiled policy.
func BenchmarkRequest(b *testing.B) {
	b.Run("http", func(b *testing.B) {
		p := startPair(b, "http", fixedApp(b))
		conn := dial(b, p.outbound.addrs[0])
		ask := func(answer []byte) {
			if _, err := io.WriteString(conn, "GET /orders/1 HTTP/1.1\r\nHost: orders\r\n\r\n"); err != nil {
				b.Fatal(err)
			}
			for n := 0; n < len(fixedAnswer); {
				got, err := conn.Read(answer[n:])
				if err != nil {
					b.Fatal(err)
				}
				n += got
			}
		}
		manyTimes(b, p, ask)
	})
	b.Run("http2", func(b *testing.B) {
		var h2c http.Protocols
		h2c.SetUnencryptedHTTP2(true)
		lis := listen(b)
		srv := &http.Server{Protocols: &h2c, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })}
		go srv.Serve(lis)
		b.Cleanup(func() { srv.Close() })
		p := startPair(b, "http2", lis.Addr().String())
		client := &http.Client{Transport: &http.Transport{Protocols: &h2c, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", p.outbound.addrs[0])
		}}}
		b.Cleanup(client.CloseIdleConnections)
		manyTimes(b, p, func([]byte) {
			res, err := client.Get("http://orders/orders/1")
			if err != nil {
				b.Fatal(err)
			}
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
		})
	})
}

func manyTimes(b *testing.B, p *pair, ask func([]byte)) {
	p.td.CompilePolicy()
	await(b, "the compiled policy", p.inbound.sidecar.id.DecidesHere)
	answer := make([]byte, 1<<10)
	ask(answer)
	b.ReportAllocs()
	for b.Loop() {
		ask(answer)
	}
}

const fixedAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

// fixedApp answers every request with fixedAnswer.
func fixedApp(b *testing.B) string {
	lis := listen(b)
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				for {
					line, err := r.ReadSlice('\n')
					if err != nil {
						return
					}
					if bytes.Equal(line, []byte("\r\n")) {
						io.WriteString(conn, fixedAnswer)
					}
				}
			}()
		}
	}()
	return lis.Addr().String()
}
