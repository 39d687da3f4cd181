// T47, T20, T50: what the processes listen on and answer there, and with which TLS.

package attacks_test

import (
	"bufio"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// listening are the TCP and UDP sockets of a process that others can send to, as
// address/network.
func listening(t *testing.T, pid int) (all []string) {
	t.Helper()
	inodes := map[string]bool{}
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if to, err := os.Readlink(dir + f.Name()); err == nil {
			if inode, ok := strings.CutPrefix(to, "socket:["); ok {
				inodes[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	for network, state := range map[string]string{"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"} {
		file, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, network))
		if os.IsNotExist(err) {
			continue // no IPv6
		}
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for lines := bufio.NewScanner(file); lines.Scan(); {
			if field := strings.Fields(lines.Text()); len(field) > 9 && field[3] == state && inodes[field[9]] {
				all = append(all, addressOf(t, field[1])+"/"+network)
			}
		}
	}
	slices.Sort(all)
	return all
}

// addressOf reads an address of /proc/net: words of 4 bytes in the machine's order.
func addressOf(t *testing.T, text string) string {
	t.Helper()
	host, port, _ := strings.Cut(text, ":")
	ip, err := hex.DecodeString(host)
	if err != nil {
		t.Fatal(err)
	}
	for word := range slices.Chunk(ip, 4) {
		slices.Reverse(word)
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort(net.IP(ip).String(), fmt.Sprint(n))
}

func TestNothingElseIsListenedOn(t *testing.T) {
	c := startTown(t)
	want := map[string][]string{}
	for _, l := range c.listeners(t) {
		if l.network == "tcp" {
			want[l.owner] = append(want[l.owner], l.address+"/tcp")
		}
	}
	for name, p := range c.processes() {
		slices.Sort(want[name])
		if got := listening(t, p.PID()); !slices.Equal(got, want[name]) {
			t.Errorf("%s listens on %q; want %q", name, got, want[name])
		}
	}
	for name, address := range map[string]string{"merlon-ca": c.Health, "merlon-agent": c.AgentHealth, "merlon-sidecar": c.sidecarHealth} {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline", "/debug/vars", "/debug/requests", "/config", "/shutdown", "/quitquitquit", "/"} {
			if code, text := get(t, "http://"+address+path); code != 404 {
				t.Errorf("%s answers %s with %d %.100q", name, path, code, text)
			}
		}
	}
	speaksTLS(t, c)
}

// tickets counts what a server gives to resume by.
type tickets struct{ given atomic.Int32 }

func (*tickets) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

func (k *tickets) Put(_ string, s *tls.ClientSessionState) {
	if s != nil {
		k.given.Add(1)
	}
}

// speaksTLS tries at every listener that has TLS what it must not do: sessions to
// resume (and so early data), an older TLS, a group that is not on the list.
func speaksTLS(t *testing.T, c *town) {
	t.Helper()
	held, err := workloadapi.FetchX509SVID(t.Context(), workloadapi.WithAddr(c.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	own := tls.Certificate{PrivateKey: held.PrivateKey}
	for _, cert := range held.Certificates {
		own.Certificate = append(own.Certificate, cert.Raw)
	}
	// talk makes a handshake and waits for what the server says after it.
	talk := func(address string, cfg *tls.Config) error {
		cfg.InsecureSkipVerify, cfg.Certificates, cfg.ServerName = true, []tls.Certificate{own}, "localhost"
		conn, err := tls.Dial("tcp", address, cfg)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
			return err
		}
		conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		_, err = io.Copy(io.Discard, conn)
		return err
	}
	tried := 0
	for name, l := range c.listeners(t) {
		protocols := []string{"http/1.1"}
		switch {
		case l.network != "tcp" || strings.Contains(name, "health"):
			continue
		case name == "the CA's gRPC":
			protocols = []string{"h2"}
		}
		tried++
		var sessions tickets
		if err := talk(l.address, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: protocols, ClientSessionCache: &sessions}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := sessions.given.Load(); n > 0 {
			t.Errorf("%s gives %d tickets to resume by", name, n)
		}
		// A bundle endpoint is for everybody's clients, which the standard lets have TLS 1.2.
		older := uint16(tls.VersionTLS12)
		if name == "the bundle endpoint" {
			older = tls.VersionTLS11
		}
		if err := talk(l.address, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: older, NextProtos: protocols}); err == nil {
			t.Errorf("%s speaks %s", name, tls.VersionName(older))
		}
		if err := talk(l.address, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: protocols, CurvePreferences: []tls.CurveID{tls.CurveP521}}); err == nil && name != "the bundle endpoint" {
			t.Errorf("%s takes the group P-521", name)
		}
	}
	if tried != 5 {
		t.Errorf("%d listeners have TLS; want 5", tried)
	}
}
