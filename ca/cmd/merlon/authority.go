// merlon authority: the signing keys of the CA, and how they follow each other.

package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

func authorityCommand(o *options) *cobra.Command {
	return noun("authority", "The signing keys of the CA: list them, and replace one by another",
		authorityList(o), authorityStatus(o), authorityPrepare(o), authorityActivate(o), authorityTaint(o), authorityRevoke(o))
}

// authorityJSON is an authority as scripts see it.
type authorityJSON struct {
	AuthorityID     string                `json:"authority_id"`
	Kind            string                `json:"kind"`
	State           string                `json:"state"`
	Replica         string                `json:"replica"`
	NotBefore       *time.Time            `json:"not_before,omitempty"`
	NotAfter        *time.Time            `json:"not_after"`
	RootHash        string                `json:"root_hash,omitempty"`
	RootAuthorityID string                `json:"root_authority_id,omitempty"`
	Since           map[string]*time.Time `json:"since,omitempty"`
	Pending         *pendingJSON          `json:"pending,omitempty"`
}

// pendingJSON is a step that is to come.
type pendingJSON struct {
	Step      string     `json:"step"`
	Ready     bool       `json:"ready"`
	Agents    []string   `json:"agents"`
	Replicas  []string   `json:"replicas"`
	NotBefore *time.Time `json:"not_before,omitempty"`
	LastCall  *time.Time `json:"last_call,omitempty"`
	Silent    []string   `json:"silent_replicas"`
}

func newAuthorityJSON(a *capb.CAAuthority) authorityJSON {
	out := authorityJSON{
		AuthorityID: a.GetAuthorityId(), Kind: a.GetKind(), State: a.GetState(), Replica: a.GetReplica(),
		NotBefore: timeOf(a.GetNotBefore()), NotAfter: timeOf(a.GetNotAfter()), RootHash: a.GetRootHash(), RootAuthorityID: a.GetRootAuthorityId(),
	}
	if len(a.GetSince()) > 0 {
		out.Since = make(map[string]*time.Time)
	}
	for state, t := range a.GetSince() {
		out.Since[state] = timeOf(t)
	}
	if p := a.GetPending(); p != nil {
		out.Pending = &pendingJSON{p.GetStep(), p.GetReady(), notNil(p.GetAgents()), notNil(p.GetReplicas()), timeOf(p.GetNotBefore()), timeOf(p.GetLastCall()), notNil(p.GetSilentReplicas())}
	}
	return out
}

func notNil(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

// waitsFor says in one line what a pending step waits for.
func waitsFor(p *capb.PendingStep) string {
	if p.GetReady() {
		return "nothing"
	}
	var parts []string
	if n := len(p.GetAgents()); n > 0 {
		parts = append(parts, fmt.Sprintf("%d agents: %s", n, someOf(p.GetAgents())))
	}
	if n := len(p.GetReplicas()); n > 0 {
		parts = append(parts, "replicas: "+someOf(p.GetReplicas()))
	}
	if n := len(p.GetSilentReplicas()); n > 0 {
		parts = append(parts, "not heard of: "+someOf(p.GetSilentReplicas()))
	}
	if t := p.GetNotBefore(); t != nil && time.Now().Before(t.AsTime()) {
		parts = append(parts, "until "+formatTime(t))
	}
	if t := p.GetLastCall(); t != nil && len(p.GetAgents())+len(p.GetReplicas())+len(p.GetSilentReplicas()) > 0 {
		parts = append(parts, "without them at "+formatTime(t))
	}
	return strings.Join(parts, "; ")
}

// someOf names the first few; -o json has all.
func someOf(names []string) string {
	const few = 5
	if len(names) > few {
		return strings.Join(names[:few], " ") + " …"
	}
	return strings.Join(names, " ")
}

func authorityList(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List every signing key of the CA with its state",
		Example: "  merlon authority list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.authorities(cmd, []string{"AUTHORITY_ID", "KIND", "STATE", "REPLICA", "NOT_AFTER"},
				func(*capb.CAAuthority) bool { return true },
				func(a *capb.CAAuthority) []string {
					return []string{a.GetAuthorityId(), a.GetKind(), a.GetState(), a.GetReplica(), formatTime(a.GetNotAfter())}
				})
		},
	}
}

func authorityStatus(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Say for each key on its way what its next step waits for, and for whom",
		Long: `Say for each key that is on its way what its next step waits for: agents that
have not acknowledged the trust bundle with it, replicas that still sign under it,
and the time until which others poll. An agent counts until the last SVID issued
through it has expired. -o json names all of them.`,
		Example: "  merlon authority status\n  merlon authority status -o json | jq -r '.[].pending.agents[]'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.authorities(cmd, []string{"AUTHORITY_ID", "KIND", "STATE", "NEXT", "WAITS_FOR"},
				func(a *capb.CAAuthority) bool { return a.GetPending() != nil },
				func(a *capb.CAAuthority) []string {
					return []string{a.GetAuthorityId(), a.GetKind(), a.GetState(), a.GetPending().GetStep(), waitsFor(a.GetPending())}
				})
		},
	}
}

// authorities prints those that are wanted.
func (o *options) authorities(cmd *cobra.Command, header []string, wanted func(*capb.CAAuthority) bool, row func(*capb.CAAuthority) []string) error {
	return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
		resp, err := ca.ListAuthorities(cmd.Context(), &capb.ListAuthoritiesRequest{})
		if err != nil {
			return err
		}
		out, rows := []authorityJSON{}, [][]string(nil)
		for _, a := range resp.GetAuthorities() {
			if wanted(a) {
				out, rows = append(out, newAuthorityJSON(a)), append(rows, row(a))
			}
		}
		if o.output == "json" {
			return printJSON(cmd.OutOrStdout(), out)
		}
		return printTable(cmd.OutOrStdout(), header, rows)
	})
}

// authorityStep takes one step, prints the authority and says what comes next.
func (o *options) authorityStep(cmd *cobra.Command, next string, step func(context.Context, capb.AdminClient) (*capb.CAAuthority, error)) error {
	return o.withCA(cmd.Context(), func(ca capb.AdminClient) error {
		a, err := step(cmd.Context(), ca)
		if err != nil {
			return stepHint(err)
		}
		if o.output == "json" {
			return printJSON(cmd.OutOrStdout(), newAuthorityJSON(a))
		}
		if err := printFields(cmd.OutOrStdout(), "authority_id", a.GetAuthorityId(), "kind", a.GetKind(), "state", a.GetState(),
			"replica", a.GetReplica(), "not_after", formatTime(a.GetNotAfter()), "root_hash", a.GetRootHash()); err != nil {
			return err
		}
		_, err = fmt.Fprintln(cmd.ErrOrStderr(), "hint:", next)
		return err
	})
}

// authorityID reads the ID of an authority: a key ID in hex.
func authorityID(cmd *cobra.Command, text string) (string, error) {
	id := strings.ToLower(strings.TrimSpace(text))
	if raw, err := hex.DecodeString(id); err != nil || len(raw) < minAuthorityID {
		return "", usageError{fmt.Sprintf("%s: %q is no authority ID, which is a key ID in hex", cmd.Name(), text), "merlon authority list shows them, whole"}
	}
	return id, nil
}

// minAuthorityID is the length of the shortest: that of a JWT key.
const minAuthorityID = 16

// stepHint says what helps against a refusal.
func stepHint(err error) error {
	switch status.Code(err) {
	case codes.NotFound:
		return hintError{err, "merlon authority list shows them"}
	case codes.FailedPrecondition:
		switch text := status.Convert(err).Message(); {
		case strings.Contains(text, "it is an intermediate"):
			return hintError{err, "merlon authority list shows the roots and JWT keys, which are replaced step by step"}
		case strings.Contains(text, "not heard of"):
			return hintError{err, "see that the replica runs and reaches its store, evict it (merlon replica evict NAME), or take the step with --force, and its agents may fail"}
		case strings.Contains(text, "not acknowledged"), strings.Contains(text, "not before"):
			return hintError{err, "merlon authority status shows who is waited for; --force does not wait, and whoever has not acknowledged may fail"}
		case strings.Contains(text, "sign nothing"), strings.Contains(text, "authorities already"):
			return hintError{err, "merlon authority list shows them; merlon authority activate ID, or merlon authority revoke ID"}
		case strings.Contains(text, "prepare and activate another"):
			return hintError{err, "merlon authority prepare --kind x509-root|jwt"}
		default:
			return hintError{err, "merlon authority status shows what can be done"}
		}
	}
	return err
}

func authorityPrepare(o *options) *cobra.Command {
	var req capb.PrepareAuthorityRequest
	cmd := &cobra.Command{
		Use:   "prepare --kind x509-root|jwt",
		Short: "Make a new key and publish it; it signs nothing yet",
		Long: `Make a new key and put it into the trust bundle, so that everybody knows it when
it begins to sign. A root is made on the replica that holds the root key, a JWT
key on the replica that is asked, for itself. Intermediates renew by themselves.`,
		Example: "  merlon authority prepare --kind x509-root",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.Kind != "x509-root" && req.Kind != "jwt" {
				return usageError{fmt.Sprintf("unknown kind of authority %q", req.Kind), "use --kind x509-root or --kind jwt"}
			}
			return o.authorityStep(cmd, "merlon authority activate ID, when `merlon authority status` shows that nothing is waited for",
				func(ctx context.Context, ca capb.AdminClient) (*capb.CAAuthority, error) {
					resp, err := ca.PrepareAuthority(ctx, &req)
					return resp.GetAuthority(), err
				})
		},
	}
	cmd.Flags().StringVar(&req.Kind, "kind", "", "x509-root or jwt (required)")
	return cmd
}

func authorityActivate(o *options) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "activate AUTHORITY_ID",
		Short: "Let a published key sign in place of the one before",
		Long: `Let a published key sign. It waits, by refusing, until every agent that counts
has acknowledged the trust bundle with the key, and three refresh hints have
passed for those who poll it. An old key can be activated again.`,
		Example: "  merlon authority activate 3f2a…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := authorityID(cmd, args[0])
			if err != nil {
				return err
			}
			return o.authorityStep(cmd, "the key before goes when what it has signed has expired; to be rid of it sooner: merlon authority taint, of its ID in `merlon authority list`",
				func(ctx context.Context, ca capb.AdminClient) (*capb.CAAuthority, error) {
					resp, err := ca.ActivateAuthority(ctx, &capb.ActivateAuthorityRequest{AuthorityId: id, Force: force})
					return resp.GetAuthority(), err
				})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "do not wait: whoever does not know the key yet refuses what it signs")
	return cmd
}

func authorityTaint(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "taint AUTHORITY_ID",
		Short: "Let agents replace at once what an old key has signed",
		Long: `Let agents replace what an old key has signed, within a minute and spread over it.
It stays in the trust bundle until it is revoked.`,
		Example: "  merlon authority taint 3f2a…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := authorityID(cmd, args[0])
			if err != nil {
				return err
			}
			return o.authorityStep(cmd, "merlon authority revoke ID, when `merlon authority status` shows that nothing is waited for",
				func(ctx context.Context, ca capb.AdminClient) (*capb.CAAuthority, error) {
					resp, err := ca.TaintAuthority(ctx, &capb.TaintAuthorityRequest{AuthorityId: id})
					return resp.GetAuthority(), err
				})
		},
	}
}

func authorityRevoke(o *options) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "revoke AUTHORITY_ID",
		Short: "Take a key out of the trust bundle, and revoke what it has signed",
		Long: `Take a key out of the trust bundle. It waits, by refusing, until everything that
the key has signed has expired, or, once it is tainted, until every agent that
counts has replaced it and three refresh hints have passed. What is left then is
revoked, and the key is removed.`,
		Example: "  merlon authority revoke 3f2a…",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := authorityID(cmd, args[0])
			if err != nil {
				return err
			}
			return o.authorityStep(cmd, "pin another root where ID was pinned: merlon token create prints the hash of the one that signs",
				func(ctx context.Context, ca capb.AdminClient) (*capb.CAAuthority, error) {
					resp, err := ca.RevokeAuthority(ctx, &capb.RevokeAuthorityRequest{AuthorityId: id, Force: force})
					return resp.GetAuthority(), err
				})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "do not wait: SVIDs under the key stop working, and an agent whose own is one needs a new join token")
	return cmd
}
