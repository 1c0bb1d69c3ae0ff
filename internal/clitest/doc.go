// SPDX-License-Identifier: Apache-2.0

// Package clitest runs scripts of command lines against a real daemon, in a lab without
// Docker. The scripts, testdata/*.txtar, show each command's help, what it does, and each
// way in which it can be refused. Needs root.
//
// Besides the commands of testscript, a script has
//
//	bpfnet ARGS...        which must exit with 0 and write nothing to standard error
//	! bpfnet ARGS...      which must exit with 1, write one line to standard error and
//	                      nothing to standard output, and change nothing: no network,
//	                      sandbox, endpoint, port, pair or address
//	usage ARGS...         the same for an error in the command line: exit status 2, and
//	                      the line says where help is
//	exits N ARGS...       for commands that pass another program's status on
//	says LINE...          what standard error held, all of it but the last newline
//	prints LINE...        the same of standard output
//	keep NAME             the first line of standard output, from here on as $NAME
//	listen PROTO PORT     a server of the host, which is $LISTENER from here on
//	hush                  its end
//	host ARGS...          a program on the host, as any process of it
//	client ARGS...        "labtool get" on the remote client
//	ready NAME            waits until the server in a sandbox listens
//	daemon start|stop     the daemon under test
//	fill, free            the disk of the state directory, where it is a small one
//
// A script ends with its sandboxes, networks and pairs removed, and then the host must be
// as it was before.
package clitest
