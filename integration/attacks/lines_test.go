// T36: whatever somebody sends, one event is one line of every log, and the line is what
// it says.

package attacks_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
)

// evil breaks lines, moves cursors, and is a record of the audit log. Where HTTP lets no
// line end through, flat does the rest.
const (
	evil = "x\r\n{\"type\":\"audit\",\"seq\":1}\ntime=2026-01-01T00:00:00Z level=INFO msg=forged\x1b[31m\u009b31m\u2028\u202e\x00"
	flat = "x{\"type\":\"audit\"}\x1b[31m\u009b31m\u2028\u202e level=INFO msg=forged"
)

// whole is what a line of a log begins with, as each program writes them.
var whole = regexp.MustCompile(`^(time=\d{4}-\S+ level=(DEBUG|INFO|WARN|ERROR) msg=|\d{4}/\d\d/\d\d \d\d:\d\d:\d\d |[a-z-]+: error: |hint: )`)

func TestNobodyWritesLinesOfALog(t *testing.T) {
	c := startTown(t)
	for _, service := range []string{"shop", "orders"} {
		for _, request := range []string{
			"GET /hello HTTP/1.1\r\nHost: a\r\nUser-Agent: " + flat + "\r\nX-Request-Id: " + flat + "\r\nX-Forwarded-For: " + flat + "\r\n",
			"POST /" + strings.ReplaceAll(flat, " ", "") + " HTTP/1.1\r\nHost: a\r\n",
			"POST /%0d%0atime=2026 HTTP/1.1\r\nHost: a\r\n", "POST /a?" + flat + " HTTP/1.1\r\nHost: a\r\n",
			strings.ReplaceAll(flat, " ", "") + " / HTTP/1.1\r\nHost: a\r\n", "POST / HTTP/1.1\r\nHost: " + flat + "\r\n",
			"POST / HTTP/1.1\r\nHost: a\r\nX: " + evil + "\r\n", "POST / HTTP/1.1\r\nHost: a\r\n" + evil + ": 1\r\n", evil,
		} {
			c.send(t, service, request+"Connection: close\r\n\r\n")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: strings.ToValidUTF8(evil, "")}, workloadapi.WithAddr(c.WorkloadAPI)); err != nil {
		t.Logf("a JWT-SVID for an odd audience: %.200q", err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "x.test"}}}
	for _, target := range []string{c.HTTPS, "https://" + c.endpoint, "http://" + c.Health, "http://" + c.AgentHealth, "http://" + c.sidecarHealth} {
		for _, path := range []string{"/%0d%0atime=2026%1b[31m", "/v1/policy/bundles/%0atime=2026?%0a"} {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, target+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+strings.NewReplacer("\r", "", "\n", "", "\x00", "", "\x1b", "").Replace(evil))
			if res, err := client.Do(req); err == nil {
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
		}
	}
	for _, args := range [][]string{
		{"entry", "create", "--spiffe-id", c.ID("/" + evil[:60]), "--selector", "unix:uid:1"},
		{"entry", "create", "--spiffe-id", c.ID("/a"), "--selector", "unix:path:/" + flat},
		{"token", "create", "--agent", flat},
		{"agent", "ban", "--note", flat, "nobody"},
		{"revoke", "--spiffe-id", c.ID("/gone"), "--note", flat},
		{"federation", "remove", flat},
		{"entry", "delete", flat},
		{"explain", "decision", flat},
	} {
		stdout, stderr, _ := c.Try(args...)
		for line := range strings.Lines(stdout + stderr) {
			if line = strings.TrimSuffix(line, "\n"); strings.ContainsFunc(line, control) || strings.HasPrefix(line, "time=") || strings.HasPrefix(line, `{"type"`) {
				t.Errorf("merlon %.40q answers with the line %q", args, line)
			}
		}
	}
	stage.Eventually(t, "what was denied is written down", func() error {
		text, err := os.ReadFile(c.decisionLog)
		if err == nil && !bytes.Contains(text, []byte("BAD_REQUEST")) {
			err = errors.New("not yet")
		}
		return err
	})
	for name, p := range c.processes() {
		n := 0
		for line := range strings.Lines(p.Log()) {
			n++
			if !whole.MatchString(line) {
				t.Errorf("%s wrote the line %q", name, line)
			}
			if i := strings.IndexFunc(strings.TrimSuffix(line, "\n"), control); i >= 0 {
				t.Errorf("%s wrote %q", name, line[max(0, i-40):min(len(line), i+40)])
			}
		}
		if n == 0 {
			t.Errorf("%s wrote nothing, so nothing is shown", name)
		}
	}
	for _, file := range []string{c.accessLog, c.decisionLog, filepath.Join(c.CAData(), "audit.jsonl")} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(text) {
			var event map[string]any
			if err := json.Unmarshal(line, &event); err != nil || event["type"] == "audit" || bytes.ContainsFunc(bytes.TrimSuffix(line, []byte("\n")), control) {
				t.Errorf("%s has the line %q, %v", file, line, err)
			}
		}
	}
	if !strings.Contains(fmt.Sprint(c.CA.Log(), c.sidecar.Log(), c.service.Log()), "forged") && !strings.Contains(read(t, c.accessLog), "forged") {
		t.Error("nothing of what was sent is in any log, so nothing is shown")
	}
}

// control characters are those that a terminal or an editor obeys.
func control(r rune) bool {
	return r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e'
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
