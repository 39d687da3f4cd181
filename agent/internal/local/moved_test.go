// A workload whose program moves to another path while its streams are open: what
// unix:path says of it is not what it was let in by.

package local

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

// actWorkload is this binary as a workload: it opens both kinds of streams that
// follow their caller, says so, and then what ended each.
func actWorkload(socket string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cc, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	api := agentpb.NewLocalClient(cc)
	watch, err := api.Watch(ctx, &agentpb.WatchRequest{})
	if err != nil {
		return err
	}
	if _, err := watch.Recv(); err != nil {
		return err
	}
	keys, err := api.HoldKeys(ctx)
	if err != nil {
		return err
	}
	if _, err := keys.Recv(); err != nil {
		return err
	}
	fmt.Println("both are open")
	for err = nil; err == nil; {
		_, err = watch.Recv()
	}
	fmt.Println("Watch", reasonOf(err))
	for err = nil; err == nil; {
		_, err = keys.Recv()
	}
	fmt.Println("HoldKeys", reasonOf(err))
	return nil
}

// reasonOf gives the reason in the ErrorInfo of err, or all of err.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return err.Error()
}

// program gives this very binary under a name of its own.
func program(t *testing.T) string {
	t.Helper()
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "web")
	if os.Link(own, name) == nil {
		return name
	}
	content, err := os.ReadFile(own) // another file system
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, content, 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestAProgramThatMovesLosesItsStreams(t *testing.T) {
	s, c := newServer(t, false)
	socket := listen(t, s)
	jwks, err := forge.New(t, "example.test").Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	apply(t, c, &capb.SyncResponse{
		Revision: 1, Entries: []*capb.Entry{ownEntry(1)},
		TrustBundle: &capb.TrustBundle{TrustDomain: "example.test", Sequence: 1, Jwks: jwks},
	})
	name := program(t)
	cmd := exec.Command(name)
	cmd.Env = append(os.Environ(), "MERLON_TEST_WORKLOAD="+socket)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() || lines.Text() != "both are open" {
		t.Fatalf("the workload said %q", lines.Text())
	}
	if err := os.Rename(name, name+"-moved"); err != nil {
		t.Fatal(err)
	}
	// The same entries, for the same file: nothing else ends its streams.
	again := ownEntry(2)
	again.Hint = "changed"
	apply(t, c, &capb.SyncResponse{Revision: 2, Entries: []*capb.Entry{again}})
	for _, want := range []string{"Watch " + endpoint.ProcessChanged, "HoldKeys " + endpoint.ProcessChanged} {
		if !lines.Scan() || lines.Text() != want {
			t.Errorf("the workload said %q; want %q", lines.Text(), want)
		}
	}
}
