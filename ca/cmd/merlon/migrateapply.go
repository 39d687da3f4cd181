// merlon migrate spire --apply: the CA makes what is not there yet. An entry is there
// when one has its SPIFFE ID, parent and selectors; a trust bundle is followed already
// when anything says where it comes from.

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/spire"
)

// apply has the CA make what is not there, and goes on after one that it refuses.
func (m *moved) apply(cmd *cobra.Command, o *options, ca capb.AdminClient) error {
	there, err := entriesByKey(cmd.Context(), ca)
	if err != nil {
		return err
	}
	follow, err := m.applyFollow(cmd.Context(), ca)
	if err != nil {
		return err
	}
	out := make([]plannedJSON, 0, len(m.entries))
	states := make(map[string]int)
	for i := range m.entries {
		p, err := applyEntry(cmd.Context(), ca, there, &m.entries[i])
		if err != nil { // nobody answers, or we may not
			return cmp.Or(printApplied(cmd, o, movedJSON{Entries: out, Follow: follow, Remarks: m.allRemarks()}), err)
		}
		if p.Reason != "" {
			m.remarks = append(m.remarks, spire.Remark{
				File: "the CA", Of: "entry " + p.SPIREID + " for " + p.Entry.SPIFFEID, Text: p.Reason, Missing: p.State == "refused",
			})
		}
		states[p.State]++
		out = append(out, p)
	}
	if err := printApplied(cmd, o, movedJSON{Entries: out, Follow: follow, Remarks: m.allRemarks()}); err != nil {
		return err
	}
	return m.conclude(cmd.ErrOrStderr(), o, fmt.Sprintf("%s: %d created, %d there already, %d there and not quite the same, %d refused",
		count(len(out), "entry", "entries"), states["created"], states["exists"], states["differs"], states["refused"]))
}

func printApplied(cmd *cobra.Command, o *options, done movedJSON) error {
	if o.output == "json" {
		return printJSON(cmd.OutOrStdout(), done)
	}
	rows := make([][]string, 0, len(done.Entries)+len(done.Follow))
	for _, f := range done.Follow {
		rows = append(rows, []string{f.State, "-", "spiffe://" + f.TrustDomain, "-"})
	}
	for _, p := range done.Entries {
		rows = append(rows, []string{p.State, cmp.Or(p.Entry.EntryID, "-"), p.Entry.SPIFFEID, p.Entry.ParentID})
	}
	return printTable(cmd.OutOrStdout(), []string{"STATE", "ENTRY_ID", "SPIFFE_ID", "PARENT_ID"}, rows)
}

// applyFollow has the CA follow the trust bundles that it does not follow yet.
func (m *moved) applyFollow(ctx context.Context, ca capb.AdminClient) ([]followJSON, error) {
	out := make([]followJSON, 0, len(m.follow))
	if len(m.follow) == 0 {
		return out, nil
	}
	resp, err := ca.ListFederatedBundles(ctx, &capb.ListFederatedBundlesRequest{})
	if err != nil {
		return nil, err
	}
	there := make(map[string]*capb.FederationSource)
	for _, b := range resp.GetFederatedBundles() {
		there[b.GetTrustBundle().GetTrustDomain()] = b.GetSource()
	}
	for _, f := range m.follow {
		done := followJSON{Follow: f, Command: followLine(f)}
		if done.State, done.Reason, err = followOne(ctx, ca, there[f.TrustDomain], f); err != nil {
			return nil, err
		}
		if done.Reason != "" {
			m.remarks = append(m.remarks, spire.Remark{File: "the CA", Of: "trust bundle of " + f.TrustDomain, Text: done.Reason, Missing: done.State == "refused"})
		}
		out = append(out, done)
	}
	return out, nil
}

// followOne begins one, where have, which may be nil, is not it.
func followOne(ctx context.Context, ca capb.AdminClient, have *capb.FederationSource, f spire.Follow) (state, reason string, err error) {
	want := &capb.FederationSource{Url: f.URL, Profile: f.Profile, EndpointSpiffeId: f.EndpointID}
	switch {
	case have == nil:
	case have.GetUrl() == want.GetUrl() && have.GetProfile() == want.GetProfile() && have.GetEndpointSpiffeId() == want.GetEndpointSpiffeId():
		return "exists", "", nil
	default:
		return "differs", "it is fetched from " + have.GetUrl() + " by " + have.GetProfile() + ", and was left as it is", nil
	}
	_, err = ca.SetFederationSource(ctx, &capb.SetFederationSourceRequest{TrustDomain: f.TrustDomain, Source: want})
	switch status.Code(err) {
	case codes.OK:
		return "created", "", nil
	case codes.InvalidArgument, codes.AlreadyExists, codes.FailedPrecondition:
		return "refused", status.Convert(err).Message(), nil
	}
	return "", "", err
}

// entriesByKey are those that the CA has.
func entriesByKey(ctx context.Context, ca capb.AdminClient) (map[string]*capb.Entry, error) {
	all, err := allEntries(ctx, ca, &capb.ListEntriesRequest{})
	if err != nil {
		return nil, err
	}
	there := make(map[string]*capb.Entry, len(all))
	for _, e := range all {
		there[keyOf(e)] = e
	}
	return there, nil
}

// keyOf is what tells entries apart.
func keyOf(e *capb.Entry) string {
	selectors := selectorStrings(e.GetSelectors())
	slices.Sort(selectors)
	return strings.Join(append(selectors, e.GetSpiffeId(), e.GetParentId()), "\x00")
}

// applyEntry makes one entry, or says why there is none to make. The error is one that
// every further entry would meet.
func applyEntry(ctx context.Context, ca capb.AdminClient, there map[string]*capb.Entry, e *spire.Entry) (plannedJSON, error) {
	want := protoOf(&e.Entry)
	p := plannedJSON{SPIREID: e.Was, Command: createLine(&e.Entry), Entry: newEntryJSON(want)}
	if have, ok := there[keyOf(want)]; ok {
		p.State, p.Entry = "exists", newEntryJSON(have)
		if differ := differences(want, have); len(differ) > 0 {
			p.State, p.Reason = "differs", fmt.Sprintf("entry %s is there, with other %s than SPIRE's, and was left as it is", have.GetEntryId(), strings.Join(differ, ", "))
		}
		return p, nil
	}
	resp, err := ca.CreateEntry(ctx, &capb.CreateEntryRequest{Entry: want})
	switch status.Code(err) {
	case codes.OK:
		p.State, p.Entry = "created", newEntryJSON(resp.GetEntry())
		there[keyOf(want)] = resp.GetEntry()
		if waiting := resp.GetEntry().GetFederationWaiting(); len(waiting) > 0 {
			p.Reason = "it waits for the trust bundle of " + strings.Join(waiting, ", ") + ": merlon federation follow, or accept"
		}
	case codes.InvalidArgument, codes.AlreadyExists, codes.FailedPrecondition:
		p.State, p.Reason = "refused", status.Convert(err).Message()
	default:
		return p, err
	}
	return p, nil
}

// differences names the fields of which SPIRE's entry says something else.
func differences(want, have *capb.Entry) []string {
	var out []string
	for name, same := range map[string]bool{
		"x509_svid_ttl":  want.GetX509SvidTtlSeconds() == have.GetX509SvidTtlSeconds(),
		"jwt_svid_ttl":   want.GetJwtSvidTtlSeconds() == have.GetJwtSvidTtlSeconds(),
		"dns_names":      slices.Equal(want.GetDnsNames(), have.GetDnsNames()),
		"hint":           want.GetHint() == have.GetHint(),
		"federates_with": slices.Equal(slices.Sorted(slices.Values(want.GetFederatesWith())), slices.Sorted(slices.Values(have.GetFederatesWith()))),
		"role":           want.GetRole() == have.GetRole() && have.GetRolePrefix() == "",
		"expires_at":     proto.Equal(want.GetExpiresAt(), have.GetExpiresAt()),
	} {
		if !same {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}
