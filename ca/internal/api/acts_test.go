// Acts: none without a record before it, whichever RPC it is and wherever the CA
// is killed.

package api

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

// records reads a log from the disk, as it is now.
func records(t *testing.T, path string) (all []audit.Record) {
	t.Helper()
	for line, err := range audit.Lines(path, 1) {
		if err != nil {
			t.Fatal(err)
		}
		var r audit.Record
		if err := json.Unmarshal(line.Text, &r); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

// newDoor is a door with a log at the path that it returns.
func newDoor(t *testing.T) (door, string) {
	t.Helper()
	dir := t.TempDir()
	s, _ := newServiceIn(t, dir)
	return door{s, accessTable()}, filepath.Join(dir, "audit.jsonl")
}

// Every RPC that an administrator may call and that does not only read is an act:
// generated from the protos, and from an RPC that they do not have yet.
func TestEveryActIsRecordedBeforeItIsDone(t *testing.T) {
	d, path := newDoor(t)
	operators := []role.Name{role.Operator}
	d.access["/test.New/Paint"] = rule{callers: []capb.Caller{capb.Caller_CALLER_ADMIN}, roles: operators, act: "paint", approval: capb.Approval_APPROVAL_NONE}
	acts := 0
	for method, r := range d.access {
		if !slices.Contains(r.callers, capb.Caller_CALLER_ADMIN) {
			continue
		}
		for name, fails := range map[string]error{"done": nil, "refused": status.Error(codes.NotFound, "no such thing"), "cut off": context.Canceled} {
			c := admin()
			if c.Using, _ = d.access.permits(method, c); len(c.Using) == 0 {
				t.Fatalf("%s is not open to an operator", method)
			}
			before := len(records(t, path))
			_, err := d.unaryAs(c, method, &emptypb.Empty{}, func(context.Context, any) (any, error) {
				during := records(t, path)[before:]
				switch {
				case r.reads && len(during) > 0:
					t.Errorf("%s only reads, and is recorded: %+v", method, during)
				case !r.reads && (len(during) != 1 || !during[0].Pending || during[0].Act == "" || during[0].Detail != "begin to "+r.act || during[0].Actor != "uid:0" || during[0].Role != "operator"):
					t.Errorf("%s: recorded before it is done: %+v; want that uid:0 begins to %s", method, during, r.act)
				}
				return nil, fails
			})
			if (err == nil) != (fails == nil) {
				t.Errorf("%s: error = %v; want one: %v", method, err, fails != nil)
			}
			if after := records(t, path)[before:]; !r.reads {
				acts++
				checkOutcome(t, method+" "+name, after)
			} else if len(after) > 0 {
				t.Errorf("%s only reads, and is recorded: %+v", method, after)
			}
		}
	}
	if acts < 3*12 { // 11 in the protos
		t.Errorf("%d acts were tried", acts)
	}
}

// unaryAs is unary after c was let in.
func (s door) unaryAs(c *Caller, method string, req any, handler grpc.UnaryHandler) (resp any, err error) {
	ctx := context.WithValue(context.Background(), callerKey{}, c)
	err = s.act(ctx, method, req, func(ctx context.Context) error {
		resp, err = handler(ctx, req)
		return err
	})
	return resp, err
}

func checkOutcome(t *testing.T, what string, story []audit.Record) {
	t.Helper()
	if len(story) != 2 || story[1].Act != story[0].Act || story[1].Pending {
		t.Errorf("%s: the records are %+v; want a beginning and one outcome", what, story)
		return
	}
	end, name := story[1], strings.TrimPrefix(story[0].Detail, "begin to ")
	_, outcome, _ := strings.Cut(what, " ")
	switch outcome {
	case "done":
		if end.Type != audit.Admin || end.Detail != name || end.Reason != "" {
			t.Errorf("%s: the outcome is %+v", what, end)
		}
	case "refused":
		if end.Type != audit.Refuse || end.Detail != name || end.Reason != "no such thing" {
			t.Errorf("%s: the outcome is %+v", what, end)
		}
	default: // it may have been done
		if end.Type != audit.Admin || !strings.Contains(end.Detail, "not known") {
			t.Errorf("%s: the outcome is %+v", what, end)
		}
	}
}

// A log that takes no records lets nothing be done.
func TestActThatCannotBeRecordedIsNotDone(t *testing.T) {
	d, _ := newDoor(t)
	if err := d.opts.Audit.Close(); err != nil {
		t.Fatal(err)
	}
	for method, r := range d.access {
		if r.act == "" {
			continue
		}
		_, err := d.unaryAs(admin(), method, &emptypb.Empty{}, func(context.Context, any) (any, error) {
			t.Errorf("%s is done without a record", method)
			return nil, nil
		})
		if st := status.Convert(err); st.Code() != codes.Unavailable || !strings.Contains(st.Message(), r.act+" was not done") {
			t.Errorf("%s: %v; want that it was not done", method, err)
		}
	}
}

// Who calls as another kind of caller does no act.
func TestAgentsDoNoActs(t *testing.T) {
	d, path := newDoor(t)
	for method := range d.access {
		c := &Caller{Name: "spiffe://shop.test/agent/n1", Kinds: []capb.Caller{capb.Caller_CALLER_ANONYMOUS, capb.Caller_CALLER_AGENT}}
		if _, err := d.unaryAs(c, method, &emptypb.Empty{}, func(context.Context, any) (any, error) { return nil, nil }); err != nil {
			t.Error(err)
		}
	}
	if all := records(t, path); len(all) > 0 {
		t.Errorf("recorded: %+v", all)
	}
}

// The name by which a restore knows backups, which take nothing back.
func TestBackedUpIsTheActOfBackupStore(t *testing.T) {
	if act := accessTable()[capb.Admin_BackupStore_FullMethodName].act; act != BackedUp {
		t.Errorf("BackupStore is the act %q; want %q", act, BackedUp)
	}
}

func TestBeginningSaysWhatIsAskedFor(t *testing.T) {
	for want, req := range map[string]proto.Message{
		`shop/x e1    " (entry: (parent_id: \"p\", selectors: (type: \"unix\", value: \"uid:1\") (type: \"unix\", value: \"gid:2\"), dns_names: \"a\" \"b\", role: ROLE_OPERATOR))"`: &capb.CreateEntryRequest{Entry: &capb.Entry{
			EntryId: "e1", SpiffeId: "shop/x", ParentId: "p", DnsNames: []string{"a", "b"}, Role: capb.Role_ROLE_OPERATOR,
			Selectors: []*capb.Selector{{Type: "unix", Value: "uid:1"}, {Type: "unix", Value: "gid:2"}},
		}},
		` e1    ""`:                     &capb.DeleteEntryRequest{EntryId: "e1"},
		`agent    note ""`:              &capb.RevokeRequest{Subject: &capb.RevokeRequest_AgentId{AgentId: "agent"}, Note: "note"},
		`   serial  ""`:                 &capb.RevokeRequest{Subject: &capb.RevokeRequest_Serial{Serial: "serial"}},
		`  id   " (force: true)"`:       &capb.RevokeAuthorityRequest{AuthorityId: "id", Force: true},
		`     " (name: \"a\\\")\\n\")"`: &capb.EvictReplicaRequest{Name: "a\")\n"},
		`     " (name: \"main\")"`:      &capb.PushPolicyRequest{Name: "main", Bundle: []byte("x")},
		`     ""`:                       &capb.BackupStoreRequest{},
	} {
		r := subjectOfRequest(req)
		quoted, err := json.Marshal(describe(req))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join([]string{r.SPIFFEID, r.EntryID, r.AuthorityID, r.Serial, r.Reason, string(quoted)}, " "); got != want {
			t.Errorf("%T says\n%s; want\n%s", req, got, want)
		}
	}
}

func FuzzDescribe(f *testing.F) {
	f.Add([]byte("\n\x05\x12\x03a/b"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		for _, m := range []proto.Message{&capb.CreateEntryRequest{}, &capb.CreateTokenRequest{}, &capb.RevokeRequest{}} {
			if proto.Unmarshal(wire, m) != nil {
				continue
			}
			if text := describe(m); len(text) > 16*maxDescription || strings.ContainsAny(text, "\n\r\x1b") {
				t.Errorf("%d bytes, %q", len(text), text[:min(len(text), 200)])
			}
			subjectOfRequest(m)
		}
	})
}

// killedIn tells a child process in which folder to do which act, and where to
// die in it.
const killedIn = "MERLON_TEST_KILLED_IN"

// mortal is a store that takes its process with it, at a transaction that writes.
type mortal struct {
	store.Store
	at string
}

func (m mortal) Txn(ctx context.Context, cmps []store.Cmp, then, otherwise []store.Op) (store.TxnResult, error) {
	if m.at == "before" {
		die()
	}
	res, err := m.Store.Txn(ctx, cmps, then, otherwise)
	if m.at == "after" && err == nil && res.Succeeded {
		die()
	}
	return res, err
}

func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // nothing returns from it
	select {}
}

// killable are the acts that one store can do, on the entry with the given ID.
var killable = map[string]func(d door, ctx context.Context, entryID string) (any, error){
	capb.Admin_CreateEntry_FullMethodName: func(d door, ctx context.Context, _ string) (any, error) {
		return d.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: newProtoEntry("/new")})
	},
	capb.Admin_DeleteEntry_FullMethodName: func(d door, ctx context.Context, id string) (any, error) {
		return d.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: id})
	},
	capb.Admin_Revoke_FullMethodName: func(d door, ctx context.Context, _ string) (any, error) {
		return d.Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: "spiffe://shop.test/w"}})
	},
	capb.Admin_CreateToken_FullMethodName: func(d door, ctx context.Context, _ string) (any, error) {
		return d.CreateToken(ctx, &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_BUNDLE_READER})
	},
}

func newProtoEntry(path string) *capb.Entry {
	return &capb.Entry{
		SpiffeId: "spiffe://shop.test" + path, ParentId: "spiffe://shop.test/agent/n1",
		Selectors: []*capb.Selector{{Type: "unix", Value: "uid:1"}},
	}
}

// TestActInAChild is the child of TestKilledInAnActLeavesItsBeginning.
func TestActInAChild(t *testing.T) {
	dir, rest, ok := strings.Cut(os.Getenv(killedIn), "\n")
	if !ok {
		t.Skip("runs as a child of TestKilledInAnActLeavesItsBeginning")
	}
	method, at, _ := strings.Cut(rest, "\n")
	s, _ := newServiceIn(t, dir)
	d := door{s, accessTable()}
	made, err := d.CreateEntry(as(t, admin()), &capb.CreateEntryRequest{Entry: newProtoEntry("/w")})
	if err != nil {
		t.Fatal(err)
	}
	d.opts.Store = mortal{d.opts.Store, at}
	_, err = d.unaryAs(admin(), method, &emptypb.Empty{}, func(ctx context.Context, _ any) (any, error) {
		return killable[method](d, ctx, made.GetEntry().GetEntryId())
	})
	t.Fatalf("it lives on: %v", err)
}

// A CA that is killed between the beginning and the transaction has done nothing;
// one that is killed between the transaction and the outcome has left a change,
// and a record of it.
func TestKilledInAnActLeavesItsBeginning(t *testing.T) {
	for method := range killable {
		for _, at := range []string{"before", "after"} {
			t.Run(filepath.Base(method)+" "+at, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestActInAChild$")
				child.Env = append(os.Environ(), killedIn+"="+dir+"\n"+method+"\n"+at)
				out, err := child.CombinedOutput()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					t.Fatalf("the child ended with %v; want it killed:\n%s", err, out)
				}
				checkKilled(t, dir, accessTable()[method].act, at == "after")
			})
		}
	}
}

// checkKilled compares what the store has with what the log says.
func checkKilled(t *testing.T, dir, act string, changed bool) {
	t.Helper()
	st, err := badger.Open(filepath.Join(dir, "store"), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	kvs, _, _, err := st.List(t.Context(), "", "", 1000, 0)
	if err != nil {
		t.Fatal(err)
	}
	var entries, others []string
	for _, kv := range kvs {
		if strings.HasPrefix(kv.Key, registry.EntryPrefix) {
			e, err := entry.Decode(kv.Value)
			if err != nil {
				t.Fatal(err)
			}
			entries = append(entries, e.SPIFFEID.Path())
		} else if !strings.HasPrefix(kv.Key, "agent") && !strings.HasPrefix(kv.Key, "handle/") {
			others = append(others, kv.Key)
		}
	}
	slices.Sort(entries)
	wantEntries := []string{"/w"}
	switch {
	case changed && act == "create entry":
		wantEntries = []string{"/new", "/w"}
	case changed && act == "delete entry":
		wantEntries = nil
	}
	if !slices.Equal(entries, wantEntries) {
		t.Errorf("the store has the entries %q; want %q", entries, wantEntries)
	}
	if made := act != "create entry" && changed; made != (len(others) > 0) {
		t.Errorf("the store has %q; want a revocation or token: %v", others, made)
	}
	path := filepath.Join(dir, "audit.jsonl")
	report, err := audit.Verify(path)
	if err != nil {
		t.Fatal(err)
	}
	if u := report.Unfinished; len(u) != 1 || u[0].Detail != "begin to "+act || u[0].Actor != "uid:0" {
		t.Errorf("unfinished: %+v; want one act, %s", u, act)
	}
	if all := records(t, path); all[len(all)-1].Detail != "begin to "+act {
		t.Errorf("the log ends with %+v", all[len(all)-1])
	}
}
