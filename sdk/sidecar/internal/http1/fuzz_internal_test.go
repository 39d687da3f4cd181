// What is taken here is taken by net/http, and understood alike.

package http1

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/policy"
)

const fuzzFields = 100

func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST /a%20b?c HTTP/1.1\r\nHost: [::1]:80\r\nContent-Length: 3\r\nX: \t y \r\n\r\nabc",
		"PUT /\xc3\xa9 HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: Chunked\r\nTrailer: x\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, x\r\nUpgrade: WebSocket\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nExpect: 100-continue\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		end, _, err := endOfHead(data, 0)
		if err != nil || end == 0 {
			return
		}
		var m message
		if m.parseRequest(data[:end:end], fuzzFields) != nil {
			return
		}
		path, _, _ := strings.Cut(string(m.target), "?")
		if policy.CheckPath(path) != nil {
			return
		}
		r := bufio.NewReader(bytes.NewReader(data))
		req, err := http.ReadRequest(r)
		if err != nil {
			t.Fatalf("%q was taken, and net/http says %v", data[:end], err)
		}
		if req.Method != string(m.method) || req.RequestURI != string(m.target) || req.Host != string(m.host) {
			t.Fatalf("%q: %s %s %s, and net/http has %s %s %s", data[:end], m.method, m.target, m.host, req.Method, req.RequestURI, req.Host)
		}
		if m.chunked != slices.Equal(req.TransferEncoding, []string{"chunked"}) || !m.chunked && req.ContentLength != max(m.length, 0) || m.close != req.Close {
			t.Fatalf("%q: chunked %v, length %d, close %v, and net/http has %v, %d, %v", data[:end], m.chunked, m.length, m.close, req.TransferEncoding, req.ContentLength, req.Close)
		}
		sameFields(t, &m, req.Header, "Host", "Transfer-Encoding", "Trailer")
		sameBody(t, &m, data[end:], req.Body)
	})
}

// sameFields compares the fields, but for those that net/http has elsewhere.
func sameFields(t *testing.T, m *message, header http.Header, but ...string) {
	t.Helper()
	ours := http.Header{}
	for i := range m.fields {
		f := &m.fields[i]
		ours.Add(string(m.name(f)), string(m.val(f)))
	}
	for _, name := range but {
		ours.Del(name)
		header.Del(name)
	}
	for name, values := range ours {
		if !slices.Equal(values, header[name]) {
			t.Fatalf("field %s: %q, and net/http has %q", name, values, header[name])
		}
	}
	if len(ours) != len(header) {
		t.Fatalf("the fields %v, and net/http has %v", ours, header)
	}
}

// sameBody compares where the body ends and what goes on of it with what net/http
// reads.
func sameBody(t *testing.T, m *message, data []byte, theirs io.Reader) {
	t.Helper()
	b := body{maxBytes: 16 << 10, maxFields: fuzzFields}
	b.form, b.left = m.bodyOf()
	n, ended, err := b.advance(data)
	got, theirErr := io.ReadAll(theirs)
	if err != nil || !ended {
		return // it is refused, or more has to come
	}
	if theirErr != nil {
		t.Fatalf("the body %q was taken, and net/http says %v", data[:n], theirErr)
	}
	if m.chunked {
		again := http.Request{Header: http.Header{}}
		sent, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), bytes.NewReader(data[:n]))))
		if err != nil {
			t.Fatal(err, again)
		}
		whole, err := io.ReadAll(sent.Body)
		if err != nil || !bytes.Equal(whole, got) {
			t.Fatalf("%q goes on, which net/http reads as %q, %v; it had read %q", data[:n], whole, err, got)
		}
		return
	}
	if string(data[:n]) != string(got) {
		t.Fatalf("the body %q, and net/http has %q", data[:n], got)
	}
}

func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"HTTP/1.0 404\r\n\r\nabc",
		"HTTP/1.1 204 \r\nConnection: close\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		end, _, err := endOfHead(data, 0)
		if err != nil || end == 0 {
			return
		}
		var m message
		if m.parseAnswer(data[:end:end], fuzzFields) != nil {
			return
		}
		res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(data)), nil)
		if err != nil {
			t.Fatalf("%q was taken, and net/http says %v", data[:end], err)
		}
		form, left := m.answerBody(false)
		if res.StatusCode != m.status || form == chunked != slices.Equal(res.TransferEncoding, []string{"chunked"}) || form == counted && res.ContentLength != left {
			t.Fatalf("%q: %d, form %d of %d, and net/http has %d, %v, %d", data[:end], m.status, form, left, res.StatusCode, res.TransferEncoding, res.ContentLength)
		}
	})
}

// However a body comes in pieces, the same goes on, and nothing of what follows it.
func TestPiecesOfABodyMakeNoDifference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var sent, want bytes.Buffer
		for _, chunk := range rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 1, 40), 0, 5).Draw(t, "chunks") {
			sent.WriteString(rapid.SampledFrom([]string{"", "0", "00"}).Draw(t, "zeros"))
			sent.WriteString(strings.ToUpper(hexOf(len(chunk))) + "\r\n")
			sent.Write(chunk)
			sent.WriteString("\r\n")
		}
		sent.WriteString("0\r\n")
		want.Write(sent.Bytes())
		for _, trailer := range rapid.SliceOfN(rapid.SampledFrom([]string{"a: b\r\n", "x-spiffe-id: c\r\n", "D:\r\n"}), 0, 4).Draw(t, "trailers") {
			sent.WriteString(trailer)
			if !strings.HasPrefix(trailer, "x-") {
				want.WriteString(trailer)
			}
		}
		sent.WriteString("\r\n")
		want.WriteString("\r\n")
		sent.WriteString("next")

		near, caller := net.Pipe()
		far, app := net.Pipe()
		go func() {
			for rest := sent.Bytes(); len(rest) > 0; {
				n := rapid.IntRange(1, len(rest)).Draw(t, "piece")
				caller.Write(rest[:n])
				rest = rest[n:]
			}
			caller.Close()
		}()
		arrived := make(chan []byte)
		go func() {
			all, _ := io.ReadAll(app)
			arrived <- all
		}()
		var in buffer
		b := body{conn: near, in: &in, form: chunked, maxBytes: 1 << 10, maxFields: 10, drop: policy.ClaimsIdentity}
		consumed := 0
		_, err := b.send(far, func(bool) error { return nil }, func() { consumed++ })
		far.Close()
		got := <-arrived
		if err != nil || consumed != 1 || !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("%q went on, err %v, ended %d times; want %q", got, err, consumed, want.Bytes())
		}
		rest := append([]byte(nil), in.bytes()...)
		more, _ := io.ReadAll(near)
		if rest = append(rest, more...); string(rest) != "next" {
			t.Fatalf("%q follows; want next", rest)
		}
		in.release()
		app.Close()
	})
}

func hexOf(n int) string {
	const digits = "0123456789abcdef"
	if n < 16 {
		return digits[n : n+1]
	}
	return hexOf(n/16) + digits[n%16:n%16+1]
}
