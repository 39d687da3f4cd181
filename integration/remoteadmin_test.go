// Administration over the network: by the SVID of an admin entry, and by
// nobody else's.

package integration_test

import (
	"os/exec"
	"testing"

	"merlon.dev/integration/stage"
)

func TestAdminSVIDAdministersOverTheNetwork(t *testing.T) {
	d := stage.Separate(t)
	remote := func(args ...string) (out string, code int) {
		stdout, stderr, err := stage.Run(t.Context(), t, []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}, "merlon", append([]string{"--ca", d.GRPC}, args...)...)
		if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // straight from Run
			code = exit.ExitCode()
		}
		return stdout + stderr, code
	}
	stage.Eventually(t, "a program without an entry is told so", func() error {
		return expect(remote("agent", "list"))(1, "hint: this program has no registration entry")
	})
	create := []string{"entry", "create", "--parent", d.AgentID(), "--selector", "unix:path:" + stage.Bin(t, "merlon")}
	d.Merlon(append(create, "--spiffe-id", d.ID("/nobody"))...)
	stage.Eventually(t, "a workload that is no admin is refused", func() error {
		return expect(remote("agent", "list"))(4, "which is for: viewer or operator")
	})
	d.Merlon("entry", "delete", entryOf(t, d, "/nobody"))
	d.Merlon(append(create, "--spiffe-id", d.ID("/operator"), "--role", "operator")...)
	stage.Eventually(t, "an admin is let in", func() error {
		return expect(remote("agent", "list"))(0, d.AgentID())
	})
	stage.Eventually(t, "an admin pushes a policy", func() error {
		return expect(remote("policy", "push", quickstartPolicy))(0, "generation")
	})
}
