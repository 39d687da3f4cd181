// Workload API clients of other languages against the real agent: the Python
// package spiffe, and @grpc/grpc-js with the standard's proto.

package integration_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

// language is a client: a command that takes `refused` or `served`.
type language struct {
	program string // that runs, as unix:path has it
	command []string
	env     []string
}

// inPython is the client on the package spiffe.
func inPython(t *testing.T) language {
	t.Helper()
	stage.Interop(t, "the Python package spiffe", "venv/lib/python3*/site-packages/spiffe/__init__.py")
	python := filepath.Join(stage.InteropDir(t), "venv", "bin", "python")
	return language{program: resolved(t, python), command: []string{python, "interop/client.py"}}
}

// inJavaScript is the client on @grpc/grpc-js. The standard's proto comes with
// go-spiffe.
func inJavaScript(t *testing.T) language {
	t.Helper()
	stage.Interop(t, "@grpc/grpc-js", "node/node_modules/@grpc/grpc-js/package.json")
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("Node.js is not installed: apt-get install nodejs")
	}
	spiffe, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/spiffe/go-spiffe/v2").Output()
	if err != nil {
		t.Fatal(err)
	}
	proto := filepath.Join(strings.TrimSpace(string(spiffe)), "proto", "spiffe", "workload", "workload.proto")
	return language{
		program: resolved(t, node), command: []string{node, "interop/client.js", proto},
		env: []string{"NODE_PATH=" + filepath.Join(stage.InteropDir(t), "node", "node_modules")},
	}
}

func resolved(t *testing.T, path string) string {
	t.Helper()
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	return real
}

// run runs the client to its end, and reads what it prints.
func (l language) run(t *testing.T, d *stage.Domain, act string, into any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.command[0], append(l.command[1:], act)...)
	cmd.Env = append(append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI, "PYTHONDONTWRITEBYTECODE=1"), l.env...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("the client, %s: %v\n%s", act, err, stage.Stderr(err))
	}
	stage.Decode(t, string(out), into)
}

// refusal is an error as a client of another language sees it.
type refusal struct {
	Code, Reason, Domain string
}

// served is what a client got.
type served struct {
	SPIFFEID      string   `json:"spiffe_id"`
	Serials       []string `json:"serials"` // before and after a rotation
	X509Bundles   []string `json:"x509_bundles"`
	JWTBundles    []string `json:"jwt_bundles"`
	JWTSVID       string   `json:"jwt_svid"`
	Validated     string   `json:"validated"`
	OtherAudience refusal  `json:"other_audience"`
}

func TestWorkloadAPIClientsOfOtherLanguages(t *testing.T) {
	t.Parallel()
	for name, in := range map[string]func(*testing.T) language{"Python": inPython, "JavaScript": inJavaScript} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it mostly waits
			checkLanguage(t, in(t))
		})
	}
}

func checkLanguage(t *testing.T, l language) {
	d := stage.Separate(t)
	d.Entry("/me")
	stage.Eventually(t, "the agent is in sync", func() error { _, err := fetch(t, d); return err })

	var refused map[string]refusal
	l.run(t, d, "refused", &refused)
	none := refusal{"PERMISSION_DENIED", "NO_MATCHING_ENTRY", "merlon.dev"}
	for call, want := range map[string]refusal{
		"no_header": {Code: "INVALID_ARGUMENT"},
		"x509_svid": none, "x509_bundles": none, "jwt_svid": none, "jwt_bundles": none, "validate": none,
	} {
		if refused[call] != want {
			t.Errorf("%s without an entry: %+v; want %+v", call, refused[call], want)
		}
	}

	id := d.ID("/other-language")
	d.Merlon("entry", "create", "--parent", d.AgentID(), "--ttl", "8s", "--spiffe-id", id, "--selector", "unix:path:"+l.program)
	var got served
	l.run(t, d, "served", &got)
	want := []string{d.TrustDomain}
	switch {
	case got.SPIFFEID != id || got.JWTSVID != id || got.Validated != id:
		t.Errorf("X509-SVID %s, JWT-SVID %s, validated %s; want %s", got.SPIFFEID, got.JWTSVID, got.Validated, id)
	case len(got.Serials) != 2 || got.Serials[0] == got.Serials[1]:
		t.Errorf("serial numbers %q; want two, by a rotation on the open stream", got.Serials)
	case !slices.Equal(got.X509Bundles, want) || !slices.Equal(got.JWTBundles, want):
		t.Errorf("bundles of %q and %q; want %q", got.X509Bundles, got.JWTBundles, want)
	case got.OtherAudience != refusal{Code: "INVALID_ARGUMENT"}:
		t.Errorf("a JWT-SVID for another audience: %+v; want INVALID_ARGUMENT", got.OtherAudience)
	}
}
