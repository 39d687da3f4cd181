// The policy verbs that need no CA: their output, exit codes and hints.

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"merlon.dev/policy/bundle"
)

const shopPolicy = "../../../examples/policies/shop"

// runPolicy executes `merlon policy args…` with stdin.
func runPolicy(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	root := rootCommand()
	root.SetArgs(append([]string{"policy"}, args...))
	root.SetIn(strings.NewReader(stdin))
	root.SetOut(&out)
	root.SetErr(&errs)
	code = exitOK
	if err := root.ExecuteContext(context.Background()); err != nil {
		var message, hint string
		code, message, hint = describe(err)
		errs.WriteString(message + "\nhint: " + hint + "\n")
	}
	return code, out.String(), errs.String()
}

// policyDir writes a policy folder with one file.
func policyDir(t *testing.T, name, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestPolicyVerbs(t *testing.T) {
	typo := policyDir(t, "grants.yaml", "grants:\n  - {id: a, form: [spiffe://a.test], tcp: {}}\n")
	send := policyDir(t, "a.rego", "package authz\n\nallow if http.send({}).ok\n")
	failing := policyDir(t, "grants.yaml", "grants:\n  - {id: a, tcp: {}}\n")
	if err := os.WriteFile(filepath.Join(failing, "grants_test.yaml"),
		[]byte("- {name: all may, source: spiffe://a.test/x, destination: spiffe://a.test/y, protocol: http, method: GET, path: /, want: allow}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	clock := policyDir(t, "a.rego", "package authz\n\nallow if time.now_ns() > 1\n")
	tests := map[string]struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		"check":          {[]string{"check", shopPolicy}, exitOK, "ok: grants: 8, Rego modules: 1", ""},
		"check as JSON":  {[]string{"check", shopPolicy, "-o", "json"}, exitOK, `"grants": 8`, ""},
		"check, typo":    {[]string{"check", typo}, exitFailure, "", `grants.yaml:2:13: grants[0]: unknown key "form" (did you mean "from"?)`},
		"check, send":    {[]string{"check", send}, exitFailure, "", "a.rego:3:10: http.send is not available"},
		"check, absent":  {[]string{"check", "absent"}, exitUsage, "", "absent is not a folder"},
		"check, no args": {[]string{"check"}, exitUsage, "", "hint: usage: merlon policy check FOLDER"},
		"test":           {[]string{"test", shopPolicy}, exitOK, "17 passed, 0 failed", ""},
		"test, failing":  {[]string{"test", failing}, exitFailure, "got deny NO_GRANT, want allow: no grant lets spiffe://a.test/x call", "1 of 1 policy tests failed"},
		"test, none":     {[]string{"test", policyDir(t, "g.yaml", "grants: []\n")}, exitFailure, "0 passed", "has no tests"},
		"build, no file": {[]string{"build", shopPolicy}, exitUsage, "", "--file bundle.tar.gz"},
		"check, paths":   {[]string{"check", clock, "--destination", "spiffe://a.test/y"}, exitOK, "spiffe://a.test/y: decided by opa, because a.rego:3: time.now_ns has no native form; evaluated for each call, because a.rego:3: time.now_ns gives another value each time\ncompiled to native programs: 0 of 1", ""},
		"check, input":   {[]string{"check", policyDir(t, "a.rego", "package authz\n\nallow if input.attributes.request.http.metod == \"GET\"\n")}, exitFailure, "", "a.rego:3:10: no call has input.attributes.request.http.metod (did you mean \"method\"?)"},
		"schema":         {[]string{"schema"}, exitOK, `"title": "The input of a Merlon policy"`, ""},
		"eval, unknown":  {[]string{"eval", shopPolicy, "--engine", "wasm"}, exitUsage, "", `unknown engine "wasm"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := runPolicy(t, "", tt.args...)
			if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.stderr) {
				t.Errorf("exit %d; want %d\nstdout: %s\nstderr: %s", code, tt.code, stdout, stderr)
			}
		})
	}
}

func TestPolicyBuildWritesTheBundle(t *testing.T) {
	file := filepath.Join(t.TempDir(), "b.tar.gz")
	if code, _, stderr := runPolicy(t, "", "build", shopPolicy, "--file", file); code != exitOK {
		t.Fatal(stderr)
	}
	raw, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(raw, []byte{0x1f, 0x8b}) {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
}

func TestPolicyEvalAnswersLineByLine(t *testing.T) {
	const (
		allowed = `{"source":"spiffe://shop.test/web","destination":"spiffe://shop.test/orders","protocol":"http","method":"GET","path":"/orders/1"}`
		denied  = `{"attributes":{"source":{"principal":"spiffe://shop.test/web"},"destination":{"principal":"spiffe://shop.test/orders"},"request":{"http":{"method":"PUT","path":"/orders?x=1"}}}}`
	)
	code, stdout, stderr := runPolicy(t, allowed+"\r\n\n"+denied, "eval", shopPolicy, "--engine", "opa")
	want := `{"allow":true,"reason":"ALLOWED","rule_id":"web-reads-orders","engine":"opa"}
{"allow":false,"reason":"METHOD","rule_id":"","engine":"opa"}
`
	if code != exitOK || stdout != want || stderr != "" {
		t.Errorf("exit %d\n%s%s\nwant\n%s", code, stdout, stderr, want)
	}
	for _, engine := range []string{"native", "auto"} {
		code, stdout, stderr := runPolicy(t, allowed+"\n"+denied, "eval", shopPolicy, "--engine", engine)
		if byNative := strings.ReplaceAll(want, `"opa"`, `"native"`); code != exitOK || stdout != byNative || stderr != "" {
			t.Errorf("--engine %s: exit %d\n%s%s\nwant\n%s", engine, code, stdout, stderr, byNative)
		}
	}
	want = strings.ReplaceAll(want, `"opa"`, `"native"`)
	long := `{"source":"` + strings.Repeat("x", 2<<20) + `"}`
	code, stdout, stderr = runPolicy(t, "{\n"+long+"\n"+allowed+"\n", "eval", shopPolicy)
	bad := `{"allow":false,"reason":"ERROR","rule_id":"","engine":"opa"}` + "\n"
	if code != exitFailure || stdout != bad+bad+strings.SplitAfter(want, "\n")[0] || !strings.Contains(stderr, "2 of 3 lines could not be read") {
		t.Errorf("exit %d\n%s%s", code, stdout, stderr)
	}
}

// Blank lines are no calls: nothing answers them, whatever the end of a line is.
func TestPolicyEvalPassesOverBlankLines(t *testing.T) {
	const call = `{"source":"spiffe://shop.test/web","destination":"spiffe://shop.test/orders","protocol":"http","method":"GET","path":"/orders/1"}`
	for _, stdin := range []string{"\n\n" + call + "\n\n\n" + call, "\r\n" + call + "\r\n\r\n" + call + "\r\n\r\n", "  \n" + call + "\n\t \n" + call + "\n "} {
		code, stdout, stderr := runPolicy(t, stdin, "eval", shopPolicy)
		if code != exitOK || strings.Count(stdout, "\n") != 2 || strings.Count(stdout, `"ALLOWED"`) != 2 || stderr != "" {
			t.Errorf("%q: exit %d, answers %q, %s; want 2 answers", stdin, code, stdout, stderr)
		}
	}
	if code, stdout, stderr := runPolicy(t, "", "eval", shopPolicy); code != exitOK || stdout+stderr != "" {
		t.Errorf("no input: exit %d, %q %q", code, stdout, stderr)
	}
	// The number of a bad line counts them.
	if _, _, stderr := runPolicy(t, "\n\n{\n", "eval", shopPolicy); !strings.HasPrefix(stderr, "line 3: ") {
		t.Errorf("a bad third line is told of as %q", stderr)
	}
}

// What has no compiled form is an error where it is asked for, and decided by OPA
// where it is not.
func TestPolicyEvalWithoutACompiledForm(t *testing.T) {
	dir := policyDir(t, "a.rego", "package authz\n\nallow if time.now_ns() > 1\n")
	const call = `{"source":"spiffe://a.test/x","destination":"spiffe://a.test/y","protocol":"tcp"}`
	code, stdout, stderr := runPolicy(t, call, "eval", dir, "--engine", "native")
	if code != exitFailure || stdout != "" || !strings.Contains(stderr, "line 1: the policy has no compiled form for this destination: a.rego:3: time.now_ns") || !strings.Contains(stderr, "hint: use --engine auto") {
		t.Errorf("--engine native: exit %d\n%s%s", code, stdout, stderr)
	}
	code, stdout, _ = runPolicy(t, call, "eval", dir)
	if want := `{"allow":true,"reason":"ALLOWED","rule_id":"rego:allow","engine":"opa"}` + "\n"; code != exitOK || stdout != want {
		t.Errorf("--engine auto: exit %d\n%s; want %s", code, stdout, want)
	}
}

// A bundle is read as far as it may be long: what is named may have no end.
func TestABundleFileWithoutEndIsRefused(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "endless.tar.gz")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(pipe, make([]byte, 2*bundle.MaxBytes), 0o600) }()
	code, _, stderr := runPolicy(t, "", "diff", shopPolicy, pipe)
	if code != exitFailure || !strings.Contains(stderr, "more than 4194304 bytes") || !strings.Contains(stderr, "hint: merlon policy build FOLDER --file "+pipe) {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if err := <-written; !errors.Is(err, unix.EPIPE) {
		t.Errorf("the file was read to its end (%v)", err)
	}
}
