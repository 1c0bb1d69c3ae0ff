// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the data path: the C programs, their compiled objects and the Go twins of every
// shape they share with Go. It imports nothing of the project.
package bpf

// The compiler is pinned by its major version: `make generate` refuses another.
//go:generate go tool bpf2go -cc clang-14 -target bpfel -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" -type reason -type hook -type fate -type endpoint_flags -type network_flags -type gateway_mode -type port_bits -type config_flags -type flow_flags -type expire_args -type event Datapath datapath.bpf.c
//go:generate go tool bpf2go -cc clang-14 -target bpfel -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -Ilib" Sock sock.bpf.c
//go:generate go tool bpf2go -cc clang-14 -target bpfel -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -Ilib" Strict strict.bpf.c
//go:generate go tool bpf2go -cc clang-14 -target bpfel -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -Ilib" Shield shield.bpf.c
//go:generate go tool bpf2go -cc clang-14 -target bpfel -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" -type pass Capture capture.bpf.c
