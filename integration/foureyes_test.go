// Four-eyes with real processes: two operators with an SVID each, and a CA that is
// killed between the proposal of the one and the grant of the other.

package integration_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
)

// operatorsTools are copies of merlon at paths of their own, so that the agent tells
// their users apart.
func operatorsTools(t *testing.T, names ...string) map[string]string {
	t.Helper()
	program, err := os.ReadFile(stage.Bin(t, "merlon"))
	if err != nil {
		t.Fatal(err)
	}
	tools := make(map[string]string)
	for _, name := range names {
		tools[name] = filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(tools[name], program, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return tools
}

// switchTo sets four_eyes in the file of the CA's settings.
func switchTo(t *testing.T, d *stage.Domain, on bool) {
	t.Helper()
	file := filepath.Join(filepath.Dir(d.CAData()), "ca.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	was, is := fmt.Sprintf("four_eyes: %v", !on), fmt.Sprintf("four_eyes: %v", on)
	if !strings.Contains(string(text), was) {
		t.Fatalf("%s does not say %s:\n%s", file, was, text)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(text), was, is, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTwoOperatorsReplaceAKeyAcrossAKill(t *testing.T) {
	d := stage.Separate(t, "four_eyes: false")
	tools := operatorsTools(t, "ann", "bob")
	for name, tool := range tools {
		d.Merlon("entry", "create", "--parent", d.AgentID(), "--selector", "unix:path:"+tool, "--spiffe-id", d.ID("/"+name), "--role", "operator")
	}
	as := func(name string, args ...string) (stdout, stderr string, code int) {
		cmd := exec.CommandContext(t.Context(), tools[name], append([]string{"--ca", d.GRPC}, args...)...)
		cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI)
		var out, errs strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		return out.String(), errs.String(), code
	}
	for name := range tools {
		stage.Eventually(t, name+" administers", func() error {
			stdout, stderr, code := as(name, "agent", "list")
			return expect(stdout+stderr, code)(0, d.AgentID())
		})
	}
	d.CA.Kill()
	switchTo(t, d, true)
	d.CA.Restart()
	stage.Eventually(t, "the CA is back", func() error { return stage.Ready(d.Health) })

	stdout, stderr, code := as("ann", "authority", "prepare", "--kind", "jwt", "-o", "json")
	var key struct {
		AuthorityID string `json:"authority_id"`
	}
	if err := json.Unmarshal([]byte(stdout), &key); err != nil || code != 0 {
		t.Fatalf("prepare, by one alone: exit code %d, %v\n%s", code, err, stderr)
	}
	stdout, stderr, code = as("ann", "authority", "activate", key.AuthorityID, "--force", "-o", "json")
	var waits struct {
		ProposalID string `json:"proposal_id"`
		Request    string `json:"request"`
	}
	if err := json.Unmarshal([]byte(stdout), &waits); err != nil || code != 5 || !strings.Contains(waits.Request, "force: true") ||
		!strings.Contains(stderr, "hint: another administrator reads it by `merlon approval list` and grants it: merlon approval grant "+waits.ProposalID) {
		t.Fatalf("activate, by one alone: exit code %d, %v\n%s%s", code, err, stdout, stderr)
	}

	d.CA.Kill()
	d.CA.Restart()
	stage.Eventually(t, "the CA is back", func() error { return stage.Ready(d.Health) })

	check := func(what string, want int, text string, stdout, stderr string, code int) {
		t.Helper()
		if err := expect(stdout+stderr, code)(want, text); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	stdout, stderr, code = as("bob", "approval", "list")
	check("list", 0, waits.ProposalID, stdout, stderr, code)
	stdout, stderr, code = as("ann", "approval", "grant", waits.ProposalID)
	check("grant by who proposed it", 4, "hint: let another administrator grant it", stdout, stderr, code)
	if a, err := stage.AuthorityIn(d, "jwt", "active"); err != nil || a.ID == key.AuthorityID {
		t.Errorf("the key that signs is %v, %v; want that of before", a, err)
	}
	stdout, stderr, code = as("bob", "approval", "grant", waits.ProposalID)
	check("grant by the other one", 0, "done", stdout, stderr, code)
	if a, err := stage.AuthorityIn(d, "jwt", "active"); err != nil || a.ID != key.AuthorityID {
		t.Errorf("the key that signs is %v, %v; want %s", a, err, key.AuthorityID)
	}
	stdout, stderr, code = as("bob", "approval", "grant", waits.ProposalID)
	check("grant again", 1, "hint: nothing is left to do", stdout, stderr, code)
}
